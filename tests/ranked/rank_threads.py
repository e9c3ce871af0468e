"""Runs a function once for each rank, in threads that share one process."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from fake_post import Office

from penstock.offload.model import load_for
from penstock.offload.policy import Policy
from penstock.scheduler.ranks.post import Post
from penstock.scheduler.sweep import thread_state


def policy_of(memory: str = "900KiB", **values: Any) -> Policy:
    values = {"io": {"reader": "threads"}, **values}
    return Policy(device_memory=memory, ranks="pipeline", **values)


class Ranks:
    """A model in `folder` that `num` ranks share: `models` has it as each has it. There
    is a `policy` for all, or one for each. `posts` are used in place of an office's."""

    def __init__(
        self,
        folder: Path,
        num: int,
        policy: Policy | Sequence[Policy],
        use: Any = "any",
        seed: int = 0,
        posts: Sequence[Post] | None = None,
    ) -> None:
        self.num = num
        self.office = Office(num, seed)
        policies = [policy] * num if isinstance(policy, Policy) else policy
        self.models = [
            load_for(use, folder, own, post=post)
            for own, post in zip(policies, posts or self.office.posts, strict=True)
        ]

    def run(self, work: Callable[[int, Any], Any], seconds: float = 60.0) -> list[Any]:
        """What `work(rank, model)` returned, or the error that it raised, by rank."""
        found: list[Any] = [None] * self.num
        office = self.office
        office.alive, office.still = set(range(self.num)), set()

        def go(rank: int) -> None:
            torch.set_num_threads(1)
            try:
                found[rank] = work(rank, self.models[rank])
            except BaseException as error:
                found[rank] = error
            office.leave(rank)

        threads = [
            threading.Thread(target=go, args=(rank,), daemon=True)
            for rank in range(self.num)
        ]
        with pytest.MonkeyPatch.context() as patched:
            for name in ("_random_state", "_set_random_state"):
                own = _one_at_a_time(getattr(thread_state, name))
                patched.setattr(thread_state, name, own)
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join(seconds)
        hung = [rank for rank, one in enumerate(threads) if one.is_alive()]
        assert not hung, f"ranks {hung} hang"
        return found

    def close(self) -> None:
        for model in self.models:
            model.__exit__(None, None, None)

    def __enter__(self) -> Ranks:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


_LOCK = threading.Lock()


def _one_at_a_time(function: Callable[..., Any]) -> Callable[..., Any]:
    """torch's own generator has a lock. Who waits for that keeps Python's, which who
    has it may need: ranks as threads would wait for each other."""

    def call(*args: Any) -> Any:
        with _LOCK:
            return function(*args)

    return call


def none_failed(found: Sequence[Any]) -> Sequence[Any]:
    """`found`, where no rank has failed."""
    for one in found:
        if isinstance(one, BaseException):
            raise one
    return found

"""Ranks as threads that read each unit together."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from fake_post import Office

import penstock
from penstock.offload.engine.engine import Engine
from penstock.offload.model import engine_of, load_for
from penstock.offload.policy import Policy
from penstock.offload.weights import hf

PATIENCE = 60.0


def gather_policy(folder: Path, memory: str = "600KiB", **values: Any) -> Policy:
    io = {"reader": "threads", "cache": folder / "cache", "direct": False}
    return Policy(device_memory=memory, ranks="gather", io=io, **values)


@contextmanager
def skeletons_one_at_a_time() -> Iterator[None]:
    """Ranks are processes: transformers does not make two models in two threads."""
    lock, build = threading.Lock(), hf.build

    def locked(*args: Any, **options: Any) -> Any:
        with lock:
            return build(*args, **options)

    vars(hf)["build"] = locked
    try:
        yield
    finally:
        vars(hf)["build"] = build


class GatherRanks:
    """Runs a program on each of `num` ranks, from the load of the model in `folder` to
    its close: `work(rank, model)`."""

    def __init__(self, folder: Path, num: int, policy: Any, seed: int = 0) -> None:
        self.folder = folder
        self.num = num
        self.policies = policy if isinstance(policy, list) else [policy] * num
        self.office = Office(num, seed)
        self.engines: dict[int, Engine] = {}

    def run(self, work: Callable[[int, Any], Any]) -> list[Any]:
        """What `work` returned on each rank, or what it raised, or loading did."""
        found: list[Any] = [None] * self.num

        def go(rank: int) -> None:
            torch.set_num_threads(1)
            post = self.office.posts[rank]
            try:
                policy = self.policies[rank]
                with load_for("any", self.folder, policy, post=post) as model:
                    self.engines[rank] = engine_of(model)
                    found[rank] = work(rank, model)
            except BaseException as error:
                found[rank] = error

        threads = [
            threading.Thread(target=go, args=(rank,), daemon=True)
            for rank in range(self.num)
        ]
        with skeletons_one_at_a_time():
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join(PATIENCE)
        hung = [rank for rank, one in enumerate(threads) if one.is_alive()]
        assert not hung, f"ranks {hung} hang"
        return found

    def read(self, rank: int) -> int:
        """Bytes that a rank has read from files."""
        return self.engines[rank]._tiers.drive.reader.statistics().bytes_read


def given(rank: int, num: int) -> list[torch.Tensor]:
    """`num` micro-batches that only this rank has."""
    generator = torch.Generator().manual_seed(100 + rank)
    return [torch.randint(8, 60, (1, 5), generator=generator) for _ in range(num)]


def score(model: Any, batches: list[torch.Tensor]) -> list[torch.Tensor]:
    with torch.no_grad(), penstock.sweep(model, seed=1, width=3) as sweep:
        return sweep.map(lambda ids: model(ids).logits, batches)

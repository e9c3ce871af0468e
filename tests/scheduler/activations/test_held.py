"""What a suspended micro-batch keeps alive is counted, once, if it is its own."""

from __future__ import annotations

from collections import UserDict
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import greenlet
import pytest
import torch
from torch import nn
from transformers import DynamicCache
from transformers.modeling_outputs import BaseModelOutput

from penstock.scheduler.activations.held import held_bytes

KIB = 1 << 10


def tensor(kib: int) -> torch.Tensor:
    return torch.zeros(kib * KIB, dtype=torch.uint8)


def wait() -> None:
    greenlet.getcurrent().parent.switch()


def held(fn: Callable[..., Any], *batch: Any) -> float:
    """KiB that `fn(*batch)` holds when it waits."""
    work = partial(fn, *batch)
    flow = greenlet.greenlet(work)
    flow.switch()
    try:
        return held_bytes(flow.gr_frame, work) / KIB
    finally:
        flow.throw(greenlet.GreenletExit)


def test_nothing_is_held_by_nobody() -> None:
    assert held_bytes(None, partial(wait)) == 0
    assert held(wait) == 0


def test_locals_of_all_frames_of_the_stack_are_held() -> None:
    def outer() -> None:
        hidden = tensor(3)

        def inner(x: torch.Tensor) -> None:
            mask = tensor(2)
            wait()
            del mask

        inner(hidden)

    assert held(outer) == 5


def test_a_storage_counts_once_however_many_view_it() -> None:
    def fn() -> None:
        whole = tensor(6)
        q, k, v = whole.chunk(3)
        same = [whole, q, k, v, {"again": q.view(2, -1)}]
        wait()
        del same

    assert held(fn) == 6


def test_a_slice_holds_all_of_its_storage() -> None:
    def fn() -> None:
        last = tensor(8)[-KIB:]
        wait()
        del last

    assert held(fn) == 8


class Pair(NamedTuple):
    one: torch.Tensor
    other: int


@dataclass
class Data:
    part: Any


class Cache:
    def __init__(self, *parts: Any) -> None:
        self.parts = list(parts)


def in_cache(x: torch.Tensor) -> Any:
    cache = DynamicCache()
    half = x.view(1, 1, -1, 8)
    cache.update(half, half, 0)
    return cache


def in_itself(x: torch.Tensor) -> Any:
    cache = Cache(x)
    cache.parts.append(cache)
    return cache


KEEPERS: dict[str, tuple[Callable[[torch.Tensor], Any], int]] = {
    "a list": (lambda x: [x], 4),
    "a tuple": (lambda x: (1, x), 4),
    "a dict": (lambda x: {"x": x}, 4),
    "a named tuple": (lambda x: Pair(x, 3), 4),
    "a dataclass": (Data, 4),
    "a model output": (lambda x: BaseModelOutput(last_hidden_state=x), 4),
    "a mapping of somebody's": (lambda x: UserDict(x=x), 4),
    "an object of somebody's": (Cache, 4),
    "objects in objects": (lambda x: Cache([Data({"x": Cache(x)})]), 4),
    "transformers' cache": (in_cache, 8),
    "itself in itself": (in_itself, 4),
}


@pytest.mark.parametrize("kind", KEEPERS)
def test_what_is_kept_in_something_is_held(kind: str) -> None:
    keep, expected = KEEPERS[kind]

    def fn() -> None:
        kept = keep(tensor(4))
        wait()
        del kept

    assert held(fn) == expected


def test_weights_belong_to_nobody() -> None:
    module = nn.Linear(64, 64)

    def fn() -> None:
        weight, again, everything = module.weight, [module.bias], dict(a=module)
        wait()
        del weight, again, everything

    assert held(fn) == 0


def test_what_has_no_memory_or_no_storage_counts_nothing() -> None:
    def fn() -> None:
        nothing = [torch.empty(9, device="meta"), torch.eye(3).to_sparse()]
        wait()
        del nothing

    assert held(fn) == 0


def test_a_batch_is_held_by_its_micro_batch() -> None:
    def fn(batch: dict[str, torch.Tensor]) -> None:
        ids = batch["ids"]
        wait()
        del ids

    assert held(fn, {"ids": tensor(4), "mask": tensor(1)}) == 5


def test_a_batch_that_is_part_of_a_data_set_counts_what_it_has_of_it() -> None:
    everything = tensor(640)

    def fn(x: torch.Tensor) -> None:
        half = x[: 2 * KIB]
        wait()
        del half

    assert held(fn, everything[: 5 * KIB]) == 5
    assert held(fn, everything) == 640


def test_what_a_function_closes_over_is_not_its_own() -> None:
    everything = tensor(640)

    def fn(index: int) -> None:
        mine = everything[index].clone()
        wait()
        del mine

    assert held(fn, 3) < 1


def test_what_the_object_of_a_method_has_is_not_its_own() -> None:
    class Job:
        def __init__(self) -> None:
            self.everything = tensor(640)

        def run(self, kib: int) -> None:
            mine = tensor(kib)
            wait()
            del mine

    assert held(Job().run, 3) == 3


def test_long_lists_and_deep_nests_are_not_searched_for_ever() -> None:
    deep: Any = tensor(4)
    for _ in range(50):
        deep = [deep]

    def fn() -> None:
        numbers, nest = list(range(100_000)), deep
        wait()
        del numbers, nest

    assert held(fn) == 0

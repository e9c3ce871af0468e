"""Small modules to stream, and what sweeps over them are compared with."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from contextvars import ContextVar
from typing import Any, TypeVar

import torch
from torch import nn

import penstock
from penstock import Policy
from penstock.offload.model import engine_of

WIDTH = 32
PAGE = 4096

log: list[tuple[str, int]] = []
"""(site, micro-batch) of every block that ran, in order."""
who: ContextVar[int] = ContextVar("who", default=-1)
"""Which micro-batch runs; its function says so."""

Batch = TypeVar("Batch")


class Block(nn.Module):
    """A layer that writes down when it runs for whom."""

    def __init__(self, name: str = "") -> None:
        super().__init__()
        self.name = name
        self.linear = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        log.append((self.name, who.get()))
        return torch.tanh(self.linear(x))


class Net(nn.Module):
    """An embedding, blocks in a row, a head: every one of them a site."""

    def __init__(self, num_blocks: int = 5) -> None:
        super().__init__()
        self.embed = Block("embed").linear
        self.blocks = nn.ModuleList(Block(str(i)) for i in range(num_blocks))
        self.head = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.embed(x)
        for block in self.blocks:
            x = block(x)
        found: torch.Tensor = self.head(x)
        return found


def make(kind: Callable[..., Any], *args: Any) -> Any:
    """A module with the same random weights every time."""
    torch.manual_seed(0)
    log.clear()
    return kind(*args).eval()


def batches(num: int, rows: int = 2) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(rows, WIDTH, generator=generator) for _ in range(num)]


def serially(
    fn: Callable[[Batch], Any], items: Iterable[Batch], *, seed: int | None = None
) -> list[Any]:
    """What a sweep must give: `fn` of one batch after the other."""
    results = []
    with torch.inference_mode():
        for index, item in enumerate(items):
            if seed is not None:
                torch.manual_seed(seed + index)
            results.append(fn(item))
    log.clear()
    return results


@contextlib.contextmanager
def streamed(module: Any, *, slots: int = 2, **policy: Any) -> Iterator[Any]:
    """`module`, streamed through `slots` slots of three pages, no site resident."""
    policy.setdefault("device_memory", slots * 3 * PAGE)
    penstock.wrap(module, Policy(resident_below=1, **policy))
    try:
        yield module
    finally:
        penstock.unwrap(module)


def open_sites(module: Any) -> list[str]:
    """The sites that somebody is inside of, and the units that are being read."""
    engine = engine_of(module)
    open_sites, units = engine._open_sites, engine._working_set
    names = [s.name for i, s in enumerate(open_sites.sites) if open_sites.is_open(i)]
    return names + (["units in use"] if units.has_readers else [])


def assert_usable(module: Any, fn: Callable[[Any], Any], expected: list[Any]) -> None:
    """Nothing stays open, and both a plain call and another sweep give `expected`."""
    assert open_sites(module) == []
    items = batches(len(expected))
    with torch.inference_mode():
        assert same(fn(items[0]), expected[0])
    with penstock.sweep(module) as sweep:
        assert same(sweep.map(fn, items), expected)
    assert open_sites(module) == []


def same(one: Any, other: Any) -> bool:
    """Bit for bit."""
    if isinstance(one, torch.Tensor):
        return isinstance(other, torch.Tensor) and torch.equal(one, other)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(same, one, other))
    return bool(one == other)

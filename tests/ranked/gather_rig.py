"""Ranks as threads that load units of one file together, without a model."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from fake_post import Office
from safetensors.torch import save_file

from penstock.io.checkpoint.index import Checkpoint, open_files
from penstock.io.errors import ReadError
from penstock.io.fallbacks import Fallbacks
from penstock.io.memory.arena import Arena
from penstock.io.readers.threads import ThreadReader
from penstock.io.timeline import unrecorded
from penstock.io.weights.layout import Layout, layout
from penstock.io.weights.loader import Loader
from penstock.io.weights.recipe import plain
from penstock.offload.ranks.gathered_loads import GatheredLoad, GatheredLoads

NUM_UNITS = 6
SLOTS = 3


class UnitFile:
    """A file of `NUM_UNITS` units of two tensors: one is used as stored, the other is
    cast."""

    def __init__(self, folder: Path) -> None:
        generator = torch.Generator().manual_seed(1)
        tensors = {}
        for unit in range(NUM_UNITS):
            wide = torch.randn(30 + 7 * unit, 300, generator=generator)
            tensors[f"u{unit}.a"] = wide
            narrow = torch.randn(501 + unit, generator=generator)
            tensors[f"u{unit}.b"] = narrow.to(torch.bfloat16)
        save_file(tensors, folder / "units.safetensors")
        self.checkpoint: Checkpoint = open_files(folder, ["units.safetensors"])
        self.wanted = {name: one.float() for name, one in tensors.items()}
        self.layouts: list[Layout] = [
            layout(
                f"u{unit}",
                [
                    plain(self.checkpoint.entries[name], name=name, dtype=torch.float32)
                    for name in (f"u{unit}.a", f"u{unit}.b")
                ],
                alignment=4096,
                memory_alignment=1,
                tensor_alignment=64,
                max_gap_bytes=0,
            )
            for unit in range(NUM_UNITS)
        ]
        self.slot_bytes = max(plan.nbytes for plan in self.layouts)


class FailingReader(ThreadReader):
    """Fails all reads from number `first_failing` on."""

    first_failing = 1 << 30
    num = 0

    def submit(self, *args: Any, **options: Any) -> Any:
        self.num += 1
        if self.num >= self.first_failing:
            raise ReadError("the drive is broken")
        return super().submit(*args, **options)


class RigRank:
    """One rank: it has `SLOTS` slots, and visits units in turn."""

    def __init__(self, file: UnitFile, office: Office, rank: int) -> None:
        self.file = file
        self.rank = rank
        self.arena = Arena(SLOTS * file.slot_bytes)
        self.reader = FailingReader(
            file.checkpoint.stamps,
            num_threads=1,
            chunk_bytes=1 << 20,
            direct=False,
            fallbacks=Fallbacks(),
        )
        self.is_busy = True
        self.loads = GatheredLoads(
            office.posts[rank],
            file.layouts,
            self.reader,
            lambda reader: Loader(
                file.layouts, self.arena, reader, bounce_bytes=1 << 20
            ),
            pace=None,
            record=unrecorded,
        )
        self.loads.ready(lambda: self.is_busy)

    def visit(self, units: list[int], ahead: int = 1) -> None:
        """Loads `units` one after the other, `ahead` of them in advance, and checks
        what is in their slots."""
        held: dict[int, tuple[int, GatheredLoad]] = {}
        free = list(range(SLOTS))
        for place, unit in enumerate(units):
            for coming in units[place : place + 1 + ahead]:
                if coming not in held and free:
                    slot = free.pop()
                    offset = slot * self.file.slot_bytes
                    held[coming] = slot, self.loads.load(coming, offset, ())
            slot, load = held[unit]
            load.wait()
            self.check(unit, slot)
            soon = units[place + 1 : place + 2 + ahead]
            for other in [one for one in held if one not in soon]:
                held[other][1].wait_quietly()
                free.append(held.pop(other)[0])
        for _, load in held.values():
            load.wait_quietly()

    def check(self, unit: int, slot: int) -> None:
        for tensor in self.file.layouts[unit].tensors:
            wanted = self.file.wanted[tensor.name]
            at = slot * self.file.slot_bytes + tensor.offset
            there = self.arena.tensor(at, wanted.nbytes).view(torch.float32)
            assert torch.equal(there, wanted.flatten()), tensor.name

    def close(self) -> None:
        self.loads.close()
        self.reader.close()
        self.arena.close()


def run_ranks(
    file: UnitFile, num: int, seed: int, work: Callable[[RigRank], Any]
) -> tuple[list[Any], list[RigRank]]:
    """What `work` returned or raised on each of `num` ranks, and the ranks."""
    office = Office(num, seed)
    found: list[Any] = [None] * num
    ranks: list[Any] = [None] * num

    def go(rank: int) -> None:
        try:
            ranks[rank] = one = RigRank(file, office, rank)
            try:
                found[rank] = work(one)
            finally:
                one.close()
        except BaseException as error:
            found[rank] = error

    threads = [threading.Thread(target=go, args=(rank,)) for rank in range(num)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    hung = [rank for rank, one in enumerate(threads) if one.is_alive()]
    assert not hung, f"ranks {hung} hang"
    return found, ranks

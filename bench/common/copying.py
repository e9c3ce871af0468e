"""Compares the host tier with a plain copy of memory, for bench/tiers.py."""

import statistics
import time
from collections import defaultdict
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from penstock.io.checkpoint.header import FileStamp, TensorEntry
from penstock.io.fallbacks import Fallbacks
from penstock.io.memory.arena import Arena, HostMemory
from penstock.io.readers.files import ALIGNMENT
from penstock.io.readers.threads import ThreadReader
from penstock.io.weights.host import HostTier
from penstock.io.weights.layout import TENSOR_ALIGNMENT, Layout, layout
from penstock.io.weights.loader import Loader
from penstock.io.weights.recipe import plain

CEILING = "plain memory"
UNIT_BYTES = 64 << 20
MAX_BYTES = 1 << 30


@dataclass(frozen=True)
class Copied:
    """The result of copying units out of this kind of memory, one by one, with one
    thread."""

    memory: str
    bytes_per_second: float
    spread: tuple[float, float]
    of_ceiling: float | None


def units_of(path: Path) -> list[Layout]:
    """Units of one tensor each, which cover the first bytes of the file."""
    size = min(path.stat().st_size, MAX_BYTES)
    entries = [
        TensorEntry(
            f"unit{offset}", torch.uint8, (nbytes,), path, offset=offset, nbytes=nbytes
        )
        for offset in range(0, size, UNIT_BYTES)
        if (nbytes := min(UNIT_BYTES, size - offset))
    ]
    return [
        layout(
            entry.name,
            [plain(entry, name=entry.name, dtype=entry.dtype)],
            alignment=ALIGNMENT,
            memory_alignment=ALIGNMENT,
            tensor_alignment=TENSOR_ALIGNMENT,
            max_gap_bytes=0,
        )
        for entry in entries
    ]


def copy_out(memory: HostMemory, offsets: list[int], target: HostMemory) -> float:
    """Copies a unit from each of `offsets` to `target`. Returns bytes per second."""
    nbytes = 0
    start = time.perf_counter()
    for offset in offsets:
        size = min(UNIT_BYTES, memory.nbytes - offset)
        source, place = memory.view(offset, size), target.view(0, size)
        place[:] = source
        source.release()
        place.release()
        nbytes += size
    return nbytes / (time.perf_counter() - start)


def run(path: Path, rounds: int) -> list[Copied]:
    """Fills a private and a shared host tier from `path`, and copies all units out of
    them.

    They take turns with copies of as many bytes out of an arena that holds nothing
    else.
    """
    stamps = {path: FileStamp.of(path.stat())}
    layouts = units_of(path)
    rates: dict[str, list[float]] = defaultdict(list)
    with ExitStack() as stack:
        reader = stack.enter_context(
            ThreadReader(
                stamps,
                num_threads=2,
                chunk_bytes=8 << 20,
                direct=True,
                fallbacks=Fallbacks(),
            )
        )
        tier: Callable[..., HostTier] = partial(
            HostTier,
            layouts,
            range(len(layouts)),
            partial(Loader, layouts, reader=reader, bounce_bytes=1 << 20),
            stamps,
            version="bench",
            progress=lambda done, total: None,
        )
        private = stack.enter_context(tier(shared=False))
        shared = stack.enter_context(tier(shared=True))
        nbytes = sum(plan.nbytes for plan in layouts)
        bare = stack.enter_context(Arena(nbytes))
        target = stack.enter_context(Arena(UNIT_BYTES))
        offsets = list(private.offsets.values())
        memories: dict[str, HostMemory] = {
            CEILING: bare,
            "host tier": private.memory,
            "host tier, shared": shared.memory,
        }
        for offset in offsets:  # unwritten pages are all the same page
            size = min(UNIT_BYTES, nbytes - offset)
            view = bare.view(offset, size)
            view[:] = private.memory.view(offset, size)
            view.release()
        copy_out(bare, offsets[:1], target)
        for number in range(rounds):
            for name in list(memories)[:: -1 if number % 2 else 1]:
                rates[name].append(copy_out(memories[name], offsets, target))
    return [
        Copied(
            name,
            statistics.median(found),
            (min(found), max(found)),
            None
            if name == CEILING
            else statistics.median(
                mine / best for mine, best in zip(found, rates[CEILING], strict=True)
            ),
        )
        for name, found in sorted(rates.items(), key=lambda item: item[0] != CEILING)
    ]

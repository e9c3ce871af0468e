"""Reads units from disk into slots of GPU memory, without a copy in host memory."""

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

import torch

from ..closing import Closing
from ..event import Event
from ..extent import Extent
from ..handle import Handle, forget_frames
from ..memory.arena import Memory
from ..readers.daemon_pool import DaemonPool
from ..readers.reader import ReaderStatistics
from ..tier import Tier
from ..timeline import Record, unrecorded
from .layout import Layout
from .load import Load
from .loader import LoaderStatistics, UnitLoad
from .transfer import Run, Transfer


class DeviceReader(Protocol):
    """Reads byte ranges of files into device memory, in no stream's order."""

    def submit(self, extent: Extent, buffer: torch.Tensor) -> Handle:
        """Starts to read `extent` into `buffer` (uint8 [extent.nbytes])."""
        ...

    def statistics(self) -> ReaderStatistics: ...


def extents_of(plan: Layout, run: Run) -> list[tuple[Extent, int]]:
    """The byte ranges of files that make up `run`, each with its offset in the run."""
    parts: list[tuple[Extent, int]] = []
    end = run.source_offset + run.nbytes
    for read in plan.reads:
        first = max(run.source_offset, read.slot_offset)
        last = min(end, read.slot_offset + read.extent.nbytes)
        if first < last:
            offset = read.extent.offset + first - read.slot_offset
            extent = Extent(read.extent.path, offset, last - first)
            parts.append((extent, first - run.source_offset))
    return parts


def made_units(layouts: Sequence[Layout]) -> frozenset[int]:
    """The units that cannot be read directly: something in them is not stored as it is
    used (a cast, small parts that are put together)."""
    return frozenset(unit for unit, plan in enumerate(layouts) if plan.decodes)


_Start = Callable[[int, int, tuple[Event, ...]], Load]
"""Starts to load a unit to an offset, after events."""


def by_unit(made: frozenset[int], start_made: _Start, start_others: _Start) -> _Start:
    """Loads units of `made` in one way, and all others in another."""

    def start(unit: int, offset: int, after: tuple[Event, ...]) -> Load:
        return (start_made if unit in made else start_others)(unit, offset, after)

    return start


class DirectToDevice(Closing):
    """Reads units that need no cast and no assembly into slots of `target`."""

    def __init__(
        self,
        layouts: Sequence[Layout],
        transfers: Mapping[int, Transfer],
        target: Memory,
        reader: DeviceReader,
        *,
        record: Record = unrecorded,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._record = record
        self._clock = clock
        self._layouts = layouts
        self._transfers = transfers
        self._target = target
        self._reader = reader
        self._lock = threading.Lock()
        self._statistics = LoaderStatistics(0, 0, 0)
        # The reads follow no stream, so this thread waits until the device's work on
        # the slot has ended. One thread keeps units in the order of the requests.
        self._pool = DaemonPool(1, "penstock-direct-to-device")

    def load(self, unit: int, offset: int, after: tuple[Event, ...]) -> UnitLoad:
        """Starts to read `unit` to `offset` (bytes) of the target.

        Its bytes there are free once all events of `after` have passed.
        """
        plan, transfer = self._layouts[unit], self._transfers[unit]
        parts = [
            (extent, offset + run.target_offset + start)
            for run in transfer.runs
            for extent, start in extents_of(plan, run)
        ]
        handle = Handle(1)
        start = self._clock()

        def note() -> None:
            nbytes = sum(extent.nbytes for extent, _ in parts)
            self._record(Tier.DISK, plan.name, start, self._clock(), nbytes)

        handle.when_done(note)

        def read() -> None:
            under_way: list[Handle] = []
            try:
                for event in after:
                    event.wait()
                for extent, where in parts:
                    target = self._target.tensor(where, extent.nbytes)
                    under_way.append(self._reader.submit(extent, target))
                for part in under_way:
                    part.wait()
            except BaseException as error:  # raised again where the unit is waited for
                for part in under_way:
                    part.wait_quietly()
                forget_frames(error)
                handle.done(error)
            else:
                handle.done()

        self._pool.submit(read)
        with self._lock:
            s = self._statistics
            self._statistics = LoaderStatistics(
                s.bytes_loaded + plan.stored_bytes, s.num_loads + 1, 0
            )
        return UnitLoad(plan.name, [handle])

    @property
    def bytes_read(self) -> int:
        """Bytes of files that were read, gaps between parameters included."""
        return self._reader.statistics().bytes_read

    def statistics(self) -> LoaderStatistics:
        with self._lock:
            return self._statistics

    def close(self) -> None:
        """Finishes the loads under way and ends the thread."""
        self._pool.shutdown(wait=True)

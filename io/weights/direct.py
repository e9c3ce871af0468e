"""Units read from disk straight into slots in a GPU's memory, past the host's."""

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
from ..timeline import Record, unrecorded
from .layout import Layout
from .loader import LoaderStatistics, UnitLoad
from .transfer import Run, Transfer


class DeviceReader(Protocol):
    """Reads extents into tensors (uint8) of a device; in no stream's order."""

    def submit(self, extent: Extent, buffer: torch.Tensor) -> Handle: ...


def extents_of(plan: Layout, run: Run) -> list[tuple[Extent, int]]:
    """What of the files makes up `run`, and where in the run each part goes."""
    found: list[tuple[Extent, int]] = []
    end = run.source_offset + run.nbytes
    for read in plan.reads:
        first = max(run.source_offset, read.slot_offset)
        last = min(end, read.slot_offset + read.extent.nbytes)
        if first < last:
            offset = read.extent.offset + first - read.slot_offset
            extent = Extent(read.extent.path, offset, last - first)
            found.append((extent, first - run.source_offset))
    return found


def why_not(layouts: Sequence[Layout]) -> str | None:
    """Why some of these units cannot be read straight; None where all can."""
    made = [p.name for p in layouts if p.copies or p.conversions]
    if made:
        return f"{made[0]!r} is not stored as it is used (a cast, an assembled part)"
    return None


class DirectToDevice(Closing):
    """Brings units that are stored as they are used into slots of `target`."""

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
        self._statistics = LoaderStatistics(0, 0, 0, 0)
        # It waits for the device, whose work on the slot must have ended: the reads
        # know of no streams. One thread: units come in the order they were asked for.
        self._pool = DaemonPool(1, "penstock-straight")

    def load(self, unit: int, offset: int, after: tuple[Event, ...]) -> UnitLoad:
        """Starts to bring `unit` to `offset`, free when all of `after` have passed."""
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
            self._record("disk", plan.name, start, self._clock(), nbytes)

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
            except BaseException as error:  # raised by whoever waits for the unit
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
                s.bytes_loaded + plan.stored_bytes, s.num_loads + 1, 0, 0
            )
        return UnitLoad(plan.name, [handle])

    def statistics(self) -> LoaderStatistics:
        with self._lock:
            return self._statistics

    def close(self) -> None:
        """Finishes what is under way and ends the thread."""
        self._pool.shutdown(wait=True)

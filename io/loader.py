"""Fills a slot with a unit: aligned windows straight into place, the rest by bounce."""

import mmap
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial

import torch

from .arena import HostMemory
from .errors import PenstockError
from .event import Event
from .extent import Extent, aligned
from .handle import Handle, forget_frames
from .layout import Conversion, Copy, Layout
from .reader import Reader
from .recipe import View
from .timeline import CAST, Record, unrecorded

_SERIAL_NUMEL = 32_000
"""Fewer elements than torch shares out (at::internal::GRAIN_SIZE is 32,768)."""


@dataclass(frozen=True, slots=True)
class LoaderStatistics:
    """Counters since the loader was made."""

    bytes_loaded: int
    """Checkpoint bytes of all loads, each unit's counted once a load."""
    num_loads: int
    bytes_copied: int
    """Bytes that passed through a bounce buffer: casts, strided parts, edge blocks."""
    bytes_converted: int
    """Bytes made by a conversion of whole tensors."""


class UnitLoad:
    """One unit on its way into its slot. Nothing of it is queued on a device."""

    ready = None

    def __init__(self, unit_name: str, handles: Sequence[Handle]) -> None:
        self._unit_name = unit_name
        self._handles = handles

    @property
    def is_done(self) -> bool:
        return all(handle.is_done for handle in self._handles)

    def wait(self) -> None:
        """Waits for every byte; raises what failed, naming the unit."""
        self.wait_quietly()
        try:
            for handle in self._handles:
                handle.wait()
        except PenstockError as error:
            raise type(error)(f"unit {self._unit_name!r}: {error}") from error
        except Exception as error:
            raise PenstockError(
                f"unit {self._unit_name!r} cannot be made of what is stored: {error!r}"
            ) from error

    def wait_quietly(self) -> None:
        """Waits until nothing writes into the slot any more."""
        for handle in self._handles:
            handle.wait_quietly()


class Loader:
    """Loads units into an arena with a reader.

    `load` returns at once; windows are filled by the reader's threads and copies by
    two threads here (one reads while the other casts), started when first needed.
    What is read is recorded in the lane `disk`, from when it was asked for.
    """

    _COPY_THREADS = 2

    def __init__(
        self,
        layouts: Sequence[Layout],
        arena: HostMemory,
        reader: Reader,
        *,
        bounce_bytes: int,
        record: Record = unrecorded,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._record = record
        self._clock = clock
        self._layouts = layouts
        self._arena = arena
        self._reader = reader
        self._bounce_bytes = bounce_bytes
        self._bounce = threading.local()
        self._pool: ThreadPoolExecutor | None = None
        self._lock = threading.Lock()
        self._statistics = LoaderStatistics(0, 0, 0, 0)

    def load(self, unit: int, offset: int, after: tuple[Event, ...] = ()) -> UnitLoad:
        """Starts loading `unit` into the arena at `offset` (aligned), where a device
        is at work until all of `after` have passed."""
        for event in after:
            event.wait()
        plan = self._layouts[unit]
        handles: list[Handle] = []
        try:
            for read in plan.reads:
                view = self._arena.view(offset + read.slot_offset, read.extent.nbytes)
                handles.append(self._submit(plan.name, read.extent, view))
            for copy in plan.copies:
                handles.append(
                    self._start(partial(self._copy, plan.name, copy, offset))
                )
            for conversion in plan.conversions:
                act = partial(self._convert, plan.name, conversion, offset)
                handles.append(self._start(act))
        except BaseException:  # nothing is under way into a slot that nobody holds
            for handle in handles:
                handle.wait_quietly()
            raise
        self._count(loaded=plan.stored_bytes, loads=1)
        return UnitLoad(plan.name, handles)

    def statistics(self) -> LoaderStatistics:
        with self._lock:
            return self._statistics

    def close(self) -> None:
        """Finishes the copies under way and ends their threads."""
        if self._pool is not None:
            self._pool.shutdown(wait=True)
            self._pool = None

    def _count(
        self, *, loaded: int = 0, loads: int = 0, copied: int = 0, converted: int = 0
    ) -> None:
        with self._lock:
            s = self._statistics
            self._statistics = LoaderStatistics(
                s.bytes_loaded + loaded,
                s.num_loads + loads,
                s.bytes_copied + copied,
                s.bytes_converted + converted,
            )

    def _start(self, act: Callable[[], None]) -> Handle:
        """Runs `act` on a copy thread; the handle raises what it raised."""
        if self._pool is None:
            self._pool = ThreadPoolExecutor(self._COPY_THREADS, "penstock-copy")
        handle = Handle(1)

        def run() -> None:
            try:
                act()
            except BaseException as error:  # raised by whoever waits for the unit
                forget_frames(error)
                handle.done(error)
            else:
                handle.done()

        self._pool.submit(run)
        return handle

    def _submit(self, unit: str, extent: Extent, buffer: memoryview) -> Handle:
        start = self._clock()
        handle = self._reader.submit(extent, buffer)

        def note() -> None:
            self._record("disk", unit, start, self._clock(), extent.nbytes)

        handle.when_done(note)
        return handle

    def _copy(self, unit: str, copy: Copy, offset: int) -> None:
        nbytes = copy.target_numel * copy.target_dtype.itemsize
        memory = self._arena.view(offset + copy.target_offset, nbytes)
        target = copy.target.on(torch.frombuffer(memory, dtype=copy.target_dtype))
        for extent, source, part in _parts(copy, target, self._bounce_bytes):
            stored = source.on(self._read(unit, extent, copy.dtype))
            start = self._clock()
            copy_serially(part, stored)
            self._record(CAST, unit, start, self._clock(), extent.nbytes)
            self._count(copied=extent.nbytes)

    def _convert(self, unit: str, conversion: Conversion, offset: int) -> None:
        recipe = conversion.recipe
        assert recipe.convert is not None, "only recipes with a function convert"
        if not recipe.nbytes:
            return
        stored = {
            entry.name: self._read(
                unit, Extent(entry.path, entry.offset, entry.nbytes), entry.dtype
            )
            .clone()
            .view(entry.shape)
            for entry in recipe.entries
        }
        start = self._clock()
        result = recipe.convert(stored).to(recipe.dtype)
        memory = self._arena.view(offset + conversion.target_offset, recipe.nbytes)
        target = torch.frombuffer(memory, dtype=recipe.dtype).view(recipe.shape)
        target.copy_(result)
        self._record(CAST, unit, start, self._clock(), recipe.nbytes)
        self._count(converted=recipe.nbytes)

    def _read(self, unit: str, extent: Extent, dtype: torch.dtype) -> torch.Tensor:
        """The elements of `extent`, valid until this thread's next read."""
        if not extent.nbytes:
            return torch.empty(0, dtype=dtype)
        window = aligned(extent, self._reader.alignment)
        buffer = getattr(self._bounce, "buffer", None)
        if buffer is None or len(buffer) < window.nbytes:
            wanted = self._bounce_bytes + 2 * self._reader.alignment
            buffer = memoryview(mmap.mmap(-1, max(window.nbytes, wanted)))
            if window.nbytes <= wanted:  # a larger one is not worth keeping
                self._bounce.buffer = buffer
        self._submit(unit, window, buffer[: window.nbytes]).wait()
        start = extent.offset - window.offset
        return torch.frombuffer(buffer[start : start + extent.nbytes], dtype=dtype)


def copy_serially(target: torch.Tensor, source: torch.Tensor) -> None:
    """Copies and casts in this thread alone: larger pieces torch would share out to a
    team of threads of its own, which fights with the one that computes."""
    if not (target.is_contiguous() and source.is_contiguous()):
        target.copy_(source)
        return
    # One call: whoever computes needs the interpreter's lock, too.
    torch._foreach_copy_(
        list(torch.split(target.view(-1), _SERIAL_NUMEL)),
        list(torch.split(source.view(-1), _SERIAL_NUMEL)),
    )


def _parts(
    copy: Copy, target: torch.Tensor, max_bytes: int
) -> Iterator[tuple[Extent, View, torch.Tensor]]:
    """Cuts a copy into parts that fit a bounce buffer: (bytes, their view, target)."""
    source, size = copy.source, copy.dtype.itemsize
    if not source.is_contiguous or copy.extent.nbytes <= max_bytes:
        yield copy.extent, source, target
        return
    if copy.target.is_contiguous:
        shape: tuple[int, ...] = (source.numel,)
        target = target.reshape(-1)
    else:
        shape = source.shape
    row = View.whole(shape[1:]).numel
    step = max(1, max_bytes // (row * size))
    for start in range(0, shape[0], step):
        count = min(step, shape[0] - start)
        extent = Extent(
            copy.extent.path,
            copy.extent.offset + start * row * size,
            count * row * size,
        )
        view = View.whole((count, *shape[1:]))
        yield extent, view, target[start : start + count]

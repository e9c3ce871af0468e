"""Reads a unit into its slot: aligned windows in place, the rest by bounce buffers."""

import ctypes
import mmap
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from ..errors import PenstockError
from ..event import Event
from ..extent import Extent, aligned
from ..handle import Handle
from ..memory.arena import HostMemory
from ..readers.reader import Reader
from ..timeline import CAST, Record, unrecorded
from .copier import BounceCopier, CopyTask
from .layout import Conversion, Copy, Layout
from .recipe import View

_SERIAL_NUMEL = 32_000
"""Fewer elements than torch copies in parallel (at::internal::GRAIN_SIZE, 32,768)."""
_NOTHING = Extent(Path(), 0, 0)


@dataclass(frozen=True, slots=True)
class LoaderStatistics:
    """Counters since the loader was made."""

    bytes_loaded: int
    """Checkpoint bytes of all loads; a unit counts at each of its loads."""
    num_loads: int
    bytes_copied: int
    """Bytes that passed a bounce buffer (casts, strided parts, parts of blocks) or were
    moved within their slot."""
    bytes_converted: int
    """Bytes of parameters that a function computed from whole tensors."""


class UnitLoad:
    """The load of one unit into its slot in host memory; no device takes part."""

    ready = None

    def __init__(self, unit_name: str, handles: Sequence[Handle]) -> None:
        self._unit_name = unit_name
        self._handles = handles

    @property
    def is_done(self) -> bool:
        return all(handle.is_done for handle in self._handles)

    def wait(self) -> None:
        """Waits for every byte; raises a PenstockError that names the unit."""
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
    """Loads units from files into `arena`.

    `load` returns at once. The threads of `reader` fill windows in place; two threads
    of the loader, started when first needed, cast and copy the rest. Each read is
    recorded in the lane `disk`, from its request to its end.
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
        self._copier = BounceCopier(
            self._submit,
            alignment=reader.alignment,
            bounce_bytes=bounce_bytes,
            num_threads=self._COPY_THREADS,
        )
        self._lock = threading.Lock()
        self._statistics = LoaderStatistics(0, 0, 0, 0)

    def load(self, unit: int, offset: int, after: tuple[Event, ...] = ()) -> UnitLoad:
        """Starts to load `unit` into the arena at `offset` (bytes, aligned like reads).

        First waits for all events of `after`: until then, a device may use the bytes
        there. Raises ClosedError after `close`.
        """
        for event in after:
            event.wait()
        plan = self._layouts[unit]
        handles: list[Handle] = []
        try:
            for read in plan.reads:
                view = self._arena.view(offset + read.slot_offset, read.extent.nbytes)
                handles.append(self._submit(plan.name, read.extent, view))
            handles.append(self._copy(plan, offset))
            if plan.moves:
                handles.append(self._move_after(handles, plan, offset))
        except BaseException:  # the caller frees the slot: no read may still write it
            for handle in handles:
                handle.wait_quietly()
            raise
        self._count(loaded=plan.stored_bytes, loads=1)
        return UnitLoad(plan.name, handles)

    def statistics(self) -> LoaderStatistics:
        with self._lock:
            return self._statistics

    def close(self) -> None:
        """Finishes the copies under way and ends the copy threads."""
        self._copier.close()

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

    def _submit(self, unit: str, extent: Extent, buffer: memoryview) -> Handle:
        start = self._clock()
        handle = self._reader.submit(extent, buffer)

        def note() -> None:
            self._record("disk", unit, start, self._clock(), extent.nbytes)

        handle.when_done(note)
        return handle

    @torch.inference_mode(False)  # the copy threads are not in the caller's mode
    def _copy(self, plan: Layout, offset: int) -> Handle:
        """Starts the copies and conversions of `plan`."""
        actions: list[tuple[Extent, Callable[[memoryview], None]]] = []
        for copy in plan.copies:
            nbytes = copy.target_numel * copy.target_dtype.itemsize
            memory = self._arena.view(offset + copy.target_offset, nbytes)
            target = copy.target.on(torch.frombuffer(memory, dtype=copy.target_dtype))
            for extent, source, part in _parts(copy, target, self._bounce_bytes):
                cast = partial(self._cast, plan.name, copy.dtype, source, part)
                actions.append((extent, cast))
        for conversion in plan.conversions:
            convert = partial(self._convert, plan.name, conversion, offset)
            actions.append((_NOTHING, convert))
        handle = Handle(len(actions))
        self._copier.put(CopyTask(plan.name, *action, handle) for action in actions)
        return handle

    def _move_after(
        self, handles: Sequence[Handle], plan: Layout, offset: int
    ) -> Handle:
        """Starts the moves of `plan` once all of `handles` are done."""
        moved, before = Handle(1), Handle(len(handles))

        def start() -> None:
            move = partial(self._move, plan, offset)
            try:
                self._copier.put([CopyTask(plan.name, _NOTHING, move, moved)])
            except Exception as error:  # the loader was closed meanwhile
                moved.done(error)

        before.when_done(start)
        for handle in handles:
            handle.when_done(before.done)
        return moved

    def _move(self, plan: Layout, offset: int, _: memoryview) -> None:
        start = self._clock()
        for move in plan.moves:
            first = offset + move.target_offset
            nbytes = move.source_offset - move.target_offset + move.nbytes
            both = self._arena.tensor(first, nbytes)
            target = both.data_ptr()
            source = target + move.source_offset - move.target_offset
            ctypes.memmove(target, source, move.nbytes)  # drops the GIL
        nbytes = sum(move.nbytes for move in plan.moves)
        self._record(CAST, plan.name, start, self._clock(), nbytes)
        self._count(copied=nbytes)

    def _cast(
        self,
        unit: str,
        dtype: torch.dtype,
        source: View,
        target: torch.Tensor,
        stored: memoryview,
    ) -> None:
        start = self._clock()
        copy_serially(target, source.on(torch.frombuffer(stored, dtype=dtype)))
        self._record(CAST, unit, start, self._clock(), len(stored))
        self._count(copied=len(stored))

    def _convert(
        self, unit: str, conversion: Conversion, offset: int, _: memoryview
    ) -> None:
        recipe = conversion.recipe
        assert recipe.convert is not None, "a conversion has a function"
        if not recipe.nbytes:
            return
        stored = {
            entry.name: self._read(
                unit, Extent(entry.path, entry.offset, entry.nbytes), entry.dtype
            ).view(entry.shape)
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
        """Reads `extent` into new memory: a one-dimensional tensor of `dtype`."""
        if not extent.nbytes:
            return torch.empty(0, dtype=dtype, device="cpu")
        window = aligned(extent, self._reader.alignment)
        buffer = memoryview(mmap.mmap(-1, window.nbytes))
        self._submit(unit, window, buffer).wait()
        start = extent.offset - window.offset
        return torch.frombuffer(buffer[start : start + extent.nbytes], dtype=dtype)


def copy_serially(target: torch.Tensor, source: torch.Tensor) -> None:
    """Copies `source` to `target` (same shape, any dtypes, CPU), and casts.

    It uses the calling thread only. Torch would split a large copy over its own thread
    pool, which would compete with the thread that computes.
    """
    if not (target.is_contiguous() and source.is_contiguous()):
        target.copy_(source)
        return
    # One call, so that the interpreter's lock is free for the computing thread.
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
    num = -(-shape[0] // max(1, max_bytes // (row * size)))
    step = -(-shape[0] // num)  # parts of nearly equal size
    for start in range(0, shape[0], step):
        count = min(step, shape[0] - start)
        extent = Extent(
            copy.extent.path,
            copy.extent.offset + start * row * size,
            count * row * size,
        )
        view = View.whole((count, *shape[1:]))
        yield extent, view, target[start : start + count]

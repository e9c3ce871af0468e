"""Reads a unit into its slot: aligned windows in place, the rest by bounce buffers."""

import ctypes
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch

from ..codecs.codec import Codec
from ..codecs.kernels import Kernels
from ..codecs.tiles import TILES
from ..errors import PenstockError
from ..event import Event
from ..extent import Extent
from ..handle import Handle
from ..memory.arena import HostMemory
from ..readers.reader import Reader
from ..tier import Tier
from ..timeline import CASTING, Record, unrecorded
from .copier import BounceCopier, CopyTask
from .decoding import parts_of
from .layout import Layout
from .steps import Chain, Input, Move


@dataclass(frozen=True, slots=True)
class LoaderStatistics:
    """Counters since the loader was made."""

    bytes_loaded: int
    """Checkpoint bytes of all loads; a unit counts at each of its loads."""
    num_loads: int
    bytes_copied: int
    """Bytes that passed a bounce buffer (what a codec decodes, strided parts, parts of
    blocks) or were moved within their slot."""


class UnitLoad:
    """The load of one unit by reads that follow no stream of a device. Once it has
    ended, all bytes are in the slot."""

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

    def when_done(self, then: Callable[[], None]) -> None:
        """Calls `then` once every read has ended; see `Handle.when_done`."""
        all_done = Handle(len(self._handles))
        for handle in self._handles:
            handle.when_done(all_done.done)
        all_done.when_done(then)


class Loader:
    """Loads units from files into `arena`.

    `load` returns at once. The threads of `reader` fill windows in place; two threads
    of the loader, started when first needed, decode and copy the rest. Each read is
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
        kernels: Kernels = TILES,
        record: Record = unrecorded,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._record = record
        self._clock = clock
        self._layouts = layouts
        self._arena = arena
        self._reader = reader
        self._bounce_bytes = bounce_bytes
        self._kernels = kernels
        self._copier = BounceCopier(
            self._submit,
            alignment=reader.alignment,
            bounce_bytes=bounce_bytes,
            num_threads=self._COPY_THREADS,
        )
        self._lock = threading.Lock()
        self._statistics = LoaderStatistics(0, 0, 0)

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
            for chain in plan.chains:
                handles.append(self._move_after(handles, plan.name, chain, offset))
            handles.append(self._decode_all(plan, offset))
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

    def _count(self, *, loaded: int = 0, loads: int = 0, copied: int = 0) -> None:
        with self._lock:
            s = self._statistics
            self._statistics = LoaderStatistics(
                s.bytes_loaded + loaded, s.num_loads + loads, s.bytes_copied + copied
            )

    def _submit(self, unit: str, extent: Extent, buffer: memoryview) -> Handle:
        start = self._clock()
        handle = self._reader.submit(extent, buffer)

        def note() -> None:
            self._record(Tier.DISK, unit, start, self._clock(), extent.nbytes)

        handle.when_done(note)
        return handle

    @torch.inference_mode(False)  # the copy threads are not in the caller's mode
    def _decode_all(self, plan: Layout, offset: int) -> Handle:
        """Starts the decodes of `plan`."""
        parts: list[tuple[Sequence[Extent], Callable[[Sequence[memoryview]], None]]]
        parts = []
        for each in plan.decodes:
            nbytes = each.target_numel * each.target_dtype.itemsize
            memory = self._arena.view(offset + each.target_offset, nbytes)
            target = each.target.on(torch.frombuffer(memory, dtype=each.target_dtype))
            for inputs, rows in parts_of(each, target, self._bounce_bytes):
                place = partial(self._decode, plan.name, each.codec, inputs, rows)
                parts.append((tuple(one.extent for one in inputs), place))
        handle = Handle(len(parts))
        self._copier.put(CopyTask(plan.name, *part, handle) for part in parts)
        return handle

    def _move_after(
        self, reads: Sequence[Handle], unit: str, chain: Chain, offset: int
    ) -> Handle:
        """Starts each move of `chain` once its read and all moves before are done."""
        all_moved, before = Handle(len(chain.moves)), Handle(0)
        for move, read in zip(chain.moves, reads[chain.first_read :], strict=False):
            ready, moved = Handle(2), Handle(1)
            place = partial(self._move, unit, move, offset)
            task = CopyTask(unit, (), place, moved)
            ready.when_done(partial(self._start, task))
            read.when_done(ready.done)
            before.when_done(ready.done)
            moved.when_done(all_moved.done)
            before = moved
        return all_moved

    def _start(self, task: CopyTask) -> None:
        try:
            self._copier.put([task])
        except Exception as error:  # the loader was closed meanwhile
            task.handle.done(error)

    def _move(
        self, unit: str, move: Move, offset: int, _: Sequence[memoryview]
    ) -> None:
        start = self._clock()
        nbytes = move.source_offset - move.target_offset + move.nbytes
        target = self._arena.tensor(offset + move.target_offset, nbytes).data_ptr()
        source = target + move.source_offset - move.target_offset
        ctypes.memmove(target, source, move.nbytes)  # drops the GIL
        self._record(CASTING, unit, start, self._clock(), move.nbytes)
        self._count(copied=move.nbytes)

    def _decode(
        self,
        unit: str,
        codec: Codec,
        inputs: Sequence[Input],
        target: torch.Tensor,
        stored: Sequence[memoryview],
    ) -> None:
        start = self._clock()
        tensors = [
            each.view.on(_elements(content, each.dtype))
            for each, content in zip(inputs, stored, strict=True)
        ]
        codec.decode(tensors, target, self._kernels)
        nbytes = sum(map(len, stored))
        self._record(CASTING, unit, start, self._clock(), nbytes)
        self._count(copied=nbytes)


def _elements(content: memoryview, dtype: torch.dtype) -> torch.Tensor:
    """The elements of `content`: one-dimensional, a view of it."""
    if not content:
        return torch.empty(0, dtype=dtype, device="cpu")
    return torch.frombuffer(content, dtype=dtype)

"""Reads that wait, and what takes them: the common parts of all readers.

A `QueuedReader` cuts each read into parts. Most queue them in a `PartQueue`, from which
`Workers` or the reader's own thread take them.
"""

import itertools
import queue
import threading
from abc import abstractmethod
from collections.abc import Callable, Iterable
from typing import Generic, NamedTuple, Protocol, Self, TypeVar

from ..closing import Closing
from ..errors import ClosedError
from ..extent import Extent, chunks
from ..fork_guard import ForkGuard
from ..handle import Handle, forget_frames
from .files import ALIGNMENT, Files, OpenFile
from .reader import ReaderStatistics

URGENT, NORMAL, LAST = range(3)


class Sliceable(Protocol):
    """A buffer to read into: a memoryview, or a uint8 tensor on a GPU."""

    def __len__(self) -> int: ...

    def __getitem__(self, key: slice, /) -> Self: ...


Buffer = TypeVar("Buffer", bound=Sliceable)


class RequestPart(NamedTuple, Generic[Buffer]):
    """One read of the device, and the handle that counts it."""

    extent: Extent
    buffer: Buffer
    handle: Handle

    def fail(self, error: BaseException) -> None:
        """Ends this part with `error`, which the waiting thread raises.

        The frames of the error are cleared. Otherwise the error would keep the buffer
        alive, and with it the mapping.
        """
        forget_frames(error)
        self.handle.done(error)


def split_read(
    extents: Iterable[Extent], buffer: Buffer
) -> tuple[Handle, list[RequestPart[Buffer]]]:
    """Splits a read whose consecutive `extents` fill `buffer` from its start.

    Returns the handle of the whole read, and its parts.
    """
    extents = list(extents)
    handle = Handle(len(extents))
    parts = []
    for extent in extents:
        start = extent.offset - extents[0].offset
        view = buffer[start : start + extent.nbytes]
        parts.append(RequestPart(extent, view, handle))
    return handle, parts


class PartQueue(Generic[Buffer]):
    """A priority queue of parts.

    After `close`, each of the `num_takers` gets None once all parts are taken.
    """

    def __init__(self) -> None:
        self._queue: queue.PriorityQueue[
            tuple[int, int, RequestPart[Buffer] | None]
        ] = queue.PriorityQueue()
        self._number = itertools.count()
        """Keeps equal priorities in order; parts are never compared."""

    def put(self, parts: Iterable[RequestPart[Buffer]], urgent: bool) -> None:
        """Queues `parts` in order; never blocks."""
        for part in parts:
            priority = URGENT if urgent else NORMAL
            self._queue.put((priority, next(self._number), part))

    def take(self, *, wait: bool = True) -> RequestPart[Buffer] | None:
        """The next part; None at the end.

        Without `wait`, raises queue.Empty if there is no part yet.
        """
        return self._queue.get(block=wait)[2]

    def close(self, num_takers: int) -> None:
        for _ in range(num_takers):
            self._queue.put((LAST, next(self._number), None))


class Count:
    """Counts reads and bytes. Any thread may call `add`."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.num_reads = 0
        self.num_bytes = 0

    def add(self, *, reads: int = 0, nbytes: int = 0) -> None:
        with self._lock:
            self.num_reads += reads
            self.num_bytes += nbytes


class QueuedReader(Closing, Generic[Buffer]):
    """Cuts each read into parts, for `num_lanes` lanes that read at the same time.

    A part has at most `chunk_bytes`, rounded to whole pages. Subclasses implement
    `_put`, which queues parts in order, on any thread, and `_finish`, which is called
    once, after the last `_put`, and finishes the queued parts.
    """

    name: str
    alignment = ALIGNMENT

    def __init__(self, files: Files, *, chunk_bytes: int, num_lanes: int) -> None:
        self._files = files
        self._chunk_bytes = chunk_bytes
        self._num_lanes = num_lanes
        self._count = Count()
        self._lock = threading.Lock()  # nothing is queued after `close`
        self._is_closed = False
        self._fork_guard = ForkGuard()

    def submit(self, extent: Extent, buffer: Buffer, *, urgent: bool = False) -> Handle:
        """Starts to read `extent` into `buffer`; see `Reader.submit`.

        Raises ClosedError after `close`, and PenstockError in a forked process.
        """
        assert len(buffer) >= extent.nbytes, "the buffer is shorter than the extent"
        self._fork_guard.check("this reader")
        extents = chunks(
            extent,
            alignment=ALIGNMENT,
            max_chunk_bytes=self._chunk_bytes,
            max_concurrency=self._num_lanes,
        )
        handle, parts = split_read(extents, buffer)
        with self._lock:
            if self._is_closed:
                raise ClosedError("this reader is closed; load the model again")
            self._put(parts, urgent)
        return handle

    def statistics(self) -> ReaderStatistics:
        return ReaderStatistics(
            self.name,
            self._count.num_bytes,
            self._count.num_reads,
            self._files.is_direct,
        )

    def close(self) -> None:
        with self._lock:
            if self._is_closed:
                return
            self._is_closed = True
        self._finish()
        self._files.close()

    @abstractmethod
    def _put(self, parts: Iterable[RequestPart[Buffer]], urgent: bool) -> None: ...

    @abstractmethod
    def _finish(self) -> None: ...


class Workers(Closing, Generic[Buffer]):
    """Runs `num_threads` threads; each takes one part at a time and reads it whole.

    `pread(file, buffer, offset)` reads into the buffer and returns the number of bytes
    read, like pread(2). It raises OSError.
    """

    def __init__(
        self,
        pread: Callable[[OpenFile, Buffer, int], int],
        files: Files,
        count: Count,
        *,
        num_threads: int,
    ) -> None:
        self._pread = pread
        self._files = files
        self._count = count
        self._parts: PartQueue[Buffer] = PartQueue()
        self._threads = [
            threading.Thread(target=self._work, name=f"penstock-read-{i}", daemon=True)
            for i in range(num_threads)
        ]
        for thread in self._threads:
            thread.start()

    def put(self, parts: Iterable[RequestPart[Buffer]], urgent: bool) -> None:
        """Queues `parts` in order; never blocks."""
        self._parts.put(parts, urgent)

    def close(self) -> None:
        """Finishes the queued parts; nothing may be put afterwards."""
        self._parts.close(len(self._threads))
        for thread in self._threads:
            thread.join()

    def _work(self) -> None:
        while (part := self._parts.take()) is not None:
            try:
                self._read(part.extent, part.buffer)
            except BaseException as error:
                part.fail(error)
            else:
                part.handle.done()
            del part  # a mapping is freed only after its last view

    def _read(self, extent: Extent, buffer: Buffer) -> None:
        file = self._files.open(extent.path)
        wanted, position = file.wanted(extent), 0
        while position < wanted:
            try:
                count = self._pread(file, buffer[position:], extent.offset + position)
            except InterruptedError:
                continue
            except OSError as error:
                raise file.failed(extent, error) from error
            position = file.advance(extent, position, count)
            self._count.add(reads=1)
        file.check()
        self._count.add(nbytes=wanted)

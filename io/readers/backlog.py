"""Reads that wait for their turn: urgent ones first, then in the order they came."""

import itertools
import queue
import threading
from collections.abc import Iterable
from typing import Generic, NamedTuple, Protocol, Self, TypeVar

from ..extent import Extent
from ..handle import Handle, forget_frames

URGENT, NORMAL, LAST = range(3)


class Sliceable(Protocol):
    """What bytes are read into: a memoryview, or a tensor of bytes on a GPU."""

    def __len__(self) -> int: ...

    def __getitem__(self, key: slice, /) -> Self: ...


Buffer = TypeVar("Buffer", bound=Sliceable)


class RequestPart(NamedTuple, Generic[Buffer]):
    """One read of the device, and the handle that it is a part of."""

    extent: Extent
    buffer: Buffer
    handle: Handle

    def fail(self, error: BaseException) -> None:
        """The waiter raises `error`, on its own thread. Whoever keeps the error must
        not keep the buffer with it: a mapping lives as long as its views."""
        forget_frames(error)
        self.handle.done(error)


def line_up(
    extents: Iterable[Extent], buffer: Buffer
) -> tuple[Handle, list[RequestPart[Buffer]]]:
    """The parts of a read whose consecutive `extents` fill `buffer` from its start."""
    extents = list(extents)
    handle = Handle(len(extents))
    parts = []
    for extent in extents:
        start = extent.offset - extents[0].offset
        view = buffer[start : start + extent.nbytes]
        parts.append(RequestPart(extent, view, handle))
    return handle, parts


class Backlog(Generic[Buffer]):
    """A priority queue of parts. `close` ends it: each of the `num_takers` gets None
    once everything before has been taken."""

    def __init__(self) -> None:
        self._queue: queue.PriorityQueue[
            tuple[int, int, RequestPart[Buffer] | None]
        ] = queue.PriorityQueue()
        self._number = itertools.count()  # keeps equals in order, and parts uncompared

    def put(self, parts: Iterable[RequestPart[Buffer]], urgent: bool) -> None:
        for part in parts:
            priority = URGENT if urgent else NORMAL
            self._queue.put((priority, next(self._number), part))

    def take(self, *, wait: bool = True) -> RequestPart[Buffer] | None:
        """The next part; None at the end. Raises queue.Empty when there is none yet and
        it is not to `wait` for one."""
        return self._queue.get(block=wait)[2]

    def close(self, num_takers: int) -> None:
        for _ in range(num_takers):
            self._queue.put((LAST, next(self._number), None))


class Count:
    """Reads and bytes, counted by any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.num_reads = 0
        self.num_bytes = 0

    def add(self, *, reads: int = 0, nbytes: int = 0) -> None:
        with self._lock:
            self.num_reads += reads
            self.num_bytes += nbytes

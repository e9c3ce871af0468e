"""A queue of reads: urgent ones first, then in the order of their requests."""

import itertools
import queue
import threading
from collections.abc import Iterable
from typing import Generic, NamedTuple, Protocol, Self, TypeVar

from ..extent import Extent
from ..handle import Handle, forget_frames

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


class Backlog(Generic[Buffer]):
    """A priority queue of parts.

    After `close`, each of the `num_takers` gets None once all parts are taken.
    """

    def __init__(self) -> None:
        self._queue: queue.PriorityQueue[
            tuple[int, int, RequestPart[Buffer] | None]
        ] = queue.PriorityQueue()
        self._number = (
            itertools.count()
        )  # keeps equal priorities in order; parts are never compared

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

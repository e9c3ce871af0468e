"""The common part of all readers: it cuts a read into parts and queues them."""

import threading
from abc import abstractmethod
from collections.abc import Iterable
from typing import Generic

from ..closing import Closing
from ..errors import ClosedError
from ..extent import Extent, chunks
from ..fork_guard import ForkGuard
from ..handle import Handle
from .backlog import Buffer, Count, RequestPart, split_read
from .files import ALIGNMENT, Files
from .reader import ReaderStatistics


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
            self._files.fallbacks,
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

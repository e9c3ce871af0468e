"""Threads that read parts one by one, in the order of a backlog."""

import threading
from collections.abc import Callable, Iterable
from typing import Generic

from ..closing import Closing
from ..extent import Extent
from .backlog import Backlog, Buffer, Count, RequestPart
from .files import Files, OpenFile


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
        self._backlog: Backlog[Buffer] = Backlog()
        self._threads = [
            threading.Thread(target=self._work, name=f"penstock-read-{i}", daemon=True)
            for i in range(num_threads)
        ]
        for thread in self._threads:
            thread.start()

    def put(self, parts: Iterable[RequestPart[Buffer]], urgent: bool) -> None:
        """Queues `parts` in order; never blocks."""
        self._backlog.put(parts, urgent)

    def close(self) -> None:
        """Finishes the queued parts; nothing may be put afterwards."""
        self._backlog.close(len(self._threads))
        for thread in self._threads:
            thread.join()

    def _work(self) -> None:
        while (part := self._backlog.take()) is not None:
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

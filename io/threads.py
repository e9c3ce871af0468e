"""The `threads` reader: preadv by a small pool of threads."""

import os
import threading
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Self

from .backlog import Backlog, Count, line_up
from .errors import ClosedError
from .extent import Extent, chunks
from .files import ALIGNMENT, Files
from .handle import Handle
from .header import FileStamp
from .reader import ReaderStatistics


class ThreadReader:
    """Reads in `num_threads` threads, in chunks of at most `chunk_bytes` (made whole
    pages).

    preadv drops the GIL and O_DIRECT leaves the copying to the device, so reading
    costs compute next to nothing. `stamps` says what each file must look like; a read
    from a file that changed fails.
    """

    name = "threads"
    alignment = ALIGNMENT

    def __init__(
        self,
        stamps: Mapping[Path, FileStamp],
        *,
        num_threads: int,
        chunk_bytes: int,
        direct: bool,
    ) -> None:
        self._chunk_bytes = chunk_bytes
        self._files = Files(stamps, direct=direct)
        self._backlog = Backlog()
        self._count = Count()
        self._is_closed = False
        self._threads = [
            threading.Thread(target=self._work, name=f"penstock-read-{i}", daemon=True)
            for i in range(num_threads)
        ]
        for thread in self._threads:
            thread.start()

    def __repr__(self) -> str:
        return (
            f"<ThreadReader: {len(self._threads)} threads, {len(self._files)} files, "
            f"{self._count.num_bytes} bytes>"
        )

    def submit(
        self, extent: Extent, buffer: memoryview, *, urgent: bool = False
    ) -> Handle:
        if self._is_closed:
            raise ClosedError("this reader is closed; load the model again")
        assert len(buffer) >= extent.nbytes, "the buffer is shorter than the extent"
        extents = chunks(
            extent,
            alignment=ALIGNMENT,
            max_chunk_bytes=self._chunk_bytes,
            max_concurrency=len(self._threads),
        )
        handle, parts = line_up(extents, buffer)
        self._backlog.put(parts, urgent)
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
        if self._is_closed:
            return
        self._is_closed = True
        self._backlog.close(len(self._threads))
        for thread in self._threads:
            thread.join()
        self._files.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def _work(self) -> None:
        while (part := self._backlog.take()) is not None:
            try:
                self._read(part.extent, part.buffer)
            except BaseException as error:
                part.fail(error)
            else:
                part.handle.done()
            del part  # a mapping lives as long as its views

    def _read(self, extent: Extent, buffer: memoryview) -> None:
        file = self._files.open(extent.path)
        wanted = file.wanted(extent)
        position = 0
        while position < wanted:
            try:
                count = os.preadv(
                    file.descriptor, [buffer[position:]], extent.offset + position
                )
            except InterruptedError:
                continue
            except OSError as error:
                raise file.failed(extent, error) from error
            position = file.advance(extent, position, count)
            self._count.add(reads=1)
        file.check()
        self._count.add(nbytes=wanted)

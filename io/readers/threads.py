"""The `threads` reader: a small pool of threads that call preadv."""

import os
from collections.abc import Iterable, Mapping
from pathlib import Path

from ..checkpoint.header import FileStamp
from ..fallbacks import Fallbacks
from .files import Files, OpenFile
from .queued_reader import QueuedReader, RequestPart, Workers


class ThreadReader(QueuedReader[memoryview]):
    """Reads in `num_threads` threads, in chunks of at most `chunk_bytes`.

    Chunks are rounded to whole pages. preadv drops the GIL, and with O_DIRECT the
    device does the copying, so reads take almost no time from the computation. A read
    fails if the file no longer has its stamp in `stamps`.
    """

    name = "threads"

    def __init__(
        self,
        stamps: Mapping[Path, FileStamp],
        *,
        num_threads: int,
        chunk_bytes: int,
        direct: bool,
        fallbacks: Fallbacks,
    ) -> None:
        super().__init__(
            Files(stamps, direct=direct, fallbacks=fallbacks),
            chunk_bytes=chunk_bytes,
            num_lanes=num_threads,
        )
        self._workers = Workers(
            _pread, self._files, self._count, num_threads=num_threads
        )

    def __repr__(self) -> str:
        return (
            f"<ThreadReader: {self._num_lanes} threads, {len(self._files)} files, "
            f"{self._count.num_bytes} bytes>"
        )

    def _put(self, parts: Iterable[RequestPart[memoryview]], urgent: bool) -> None:
        self._workers.put(parts, urgent)

    def _finish(self) -> None:
        self._workers.close()


def _pread(file: OpenFile, buffer: memoryview, offset: int) -> int:
    return os.preadv(file.descriptor, [buffer], offset)

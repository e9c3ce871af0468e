"""The `threads` reader: preadv by a small pool of threads."""

import os
from collections.abc import Iterable, Mapping
from pathlib import Path

from ..checkpoint.header import FileStamp
from .backlog import RequestPart
from .files import Files, OpenFile
from .queued import QueuedReader
from .workers import Workers


class ThreadReader(QueuedReader[memoryview]):
    """Reads in `num_threads` threads, in chunks of at most `chunk_bytes` (made whole
    pages).

    preadv drops the GIL and O_DIRECT leaves the copying to the device, so reading
    costs compute next to nothing. `stamps` says what each file must look like; a read
    from a file that changed fails.
    """

    name = "threads"

    def __init__(
        self,
        stamps: Mapping[Path, FileStamp],
        *,
        num_threads: int,
        chunk_bytes: int,
        direct: bool,
    ) -> None:
        super().__init__(
            Files(stamps, direct=direct), chunk_bytes=chunk_bytes, num_lanes=num_threads
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

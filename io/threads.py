"""The `threads` reader: preadv on O_DIRECT descriptors by a small pool of threads."""

import errno
import itertools
import logging
import mmap
import os
import queue
import threading
import traceback
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import NamedTuple, Self

from .errors import CheckpointChangedError, CheckpointError, ClosedError, ReadError
from .extent import Extent, align_up, chunks
from .handle import Handle
from .header import FileStamp
from .reader import ReaderStatistics

_log = logging.getLogger("penstock")
_ALIGNMENT = 4096  # every O_DIRECT file system accepts it; 512 would save < 8 KiB


_URGENT, _NORMAL, _LAST = range(3)


class _Job(NamedTuple):
    extent: Extent
    buffer: memoryview
    handle: Handle


class ThreadReader:
    """Reads in `num_threads` threads, in chunks of `chunk_bytes` (made whole pages).

    preadv drops the GIL and O_DIRECT leaves the copying to the device, so reading
    costs compute next to nothing. A file system that refuses O_DIRECT is read through
    the page cache: announced once and kept in the statistics.

    `stamps` says what each file must look like; a read from a file that changed fails.
    """

    alignment = _ALIGNMENT

    def __init__(
        self,
        stamps: Mapping[Path, FileStamp],
        *,
        num_threads: int,
        chunk_bytes: int,
        direct: bool,
    ) -> None:
        self._stamps = stamps
        self._chunk_bytes = align_up(chunk_bytes, _ALIGNMENT)
        self._direct = direct
        self._jobs: queue.PriorityQueue[tuple[int, int, _Job | None]] = (
            queue.PriorityQueue()
        )
        self._number = itertools.count()
        self._lock = threading.Lock()
        self._files: dict[Path, tuple[int, bool]] = {}
        self._fallbacks: list[str] = []
        self._bytes_read = 0
        self._num_reads = 0
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
            f"{self._bytes_read} bytes>"
        )

    def submit(
        self, extent: Extent, buffer: memoryview, *, urgent: bool = False
    ) -> Handle:
        if self._is_closed:
            raise ClosedError("this reader is closed; load the model again")
        assert len(buffer) >= extent.nbytes, "the buffer is shorter than the extent"
        parts = list(chunks(extent, max_chunk_bytes=self._chunk_bytes))
        handle = Handle(len(parts))
        for part in parts:
            start = part.offset - extent.offset
            job = _Job(part, buffer[start : start + part.nbytes], handle)
            self._put(job, _URGENT if urgent else _NORMAL)
        return handle

    def statistics(self) -> ReaderStatistics:
        with self._lock:
            return ReaderStatistics(
                self._bytes_read,
                self._num_reads,
                all(is_direct for _, is_direct in self._files.values()),
                tuple(self._fallbacks),
            )

    def close(self) -> None:
        if self._is_closed:
            return
        self._is_closed = True
        for _ in self._threads:
            self._put(None, _LAST)
        for thread in self._threads:
            thread.join()
        for descriptor, _ in self._files.values():
            os.close(descriptor)
        self._files.clear()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def _put(self, job: "_Job | None", priority: int) -> None:
        # The number keeps equals in order and jobs from being compared.
        self._jobs.put((priority, next(self._number), job))

    def _work(self) -> None:
        while (job := self._jobs.get()[2]) is not None:
            handle = job.handle
            try:
                self._read(job.extent, job.buffer)
            except BaseException as error:  # the waiter raises it, on its own thread
                # Whoever keeps the error must not keep the buffer with it.
                traceback.clear_frames(error.__traceback__)
                handle.done(error)
            else:
                handle.done()
            del job, handle  # a mapping lives as long as its views

    def _read(self, extent: Extent, buffer: memoryview) -> None:
        descriptor, stamp = self._open(extent.path)
        wanted = min(extent.end, stamp.size_bytes) - extent.offset
        position = 0
        while position < wanted:
            try:
                count = os.preadv(
                    descriptor, [buffer[position:]], extent.offset + position
                )
            except OSError as error:
                raise ReadError(
                    f"reading {extent.nbytes} bytes at {extent.offset} of "
                    f"{extent.path} failed: {error.strerror}"
                ) from error
            if count <= 0:
                raise CheckpointChangedError(
                    f"{extent.path} ends at {extent.offset + position} bytes but had "
                    f"{stamp.size_bytes} when it was opened; load it again"
                )
            position += count
            with self._lock:
                self._num_reads += 1
        # After the read: what was read before a change is what the header described.
        if FileStamp.of(os.fstat(descriptor)) != stamp:
            raise CheckpointChangedError(
                f"{extent.path} was changed while it was being read; load it again"
            )
        with self._lock:
            self._bytes_read += max(wanted, 0)

    def _open(self, path: Path) -> tuple[int, FileStamp]:
        with self._lock:
            if path not in self._files:
                self._files[path] = self._open_file(path)
            return self._files[path][0], self._stamps[path]

    def _open_file(self, path: Path) -> tuple[int, bool]:
        try:
            if self._direct and (descriptor := _open_direct(path)) is not None:
                return descriptor, True
            descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise CheckpointError(f"cannot open {path}: {error.strerror}") from error
        if self._direct and not self._fallbacks:
            message = f"no O_DIRECT on {path.parent}: reading through the page cache"
            self._fallbacks.append(message)
            _log.warning(message)
        return descriptor, False


def _open_direct(path: Path) -> int | None:
    """A descriptor that really reads directly, or None: file systems that refuse
    O_DIRECT do so at open or at the first read, so both are tried."""
    flag = getattr(os, "O_DIRECT", None)
    if flag is None:
        return None
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | flag)
    except OSError as error:
        if error.errno == errno.EINVAL:
            return None
        raise
    with mmap.mmap(-1, _ALIGNMENT) as page:
        try:
            os.preadv(descriptor, [page], 0)
        except OSError:
            os.close(descriptor)
            return None
    return descriptor

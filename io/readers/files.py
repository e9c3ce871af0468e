"""The files of a checkpoint as a reader opens them: once each, past the page cache
where their file system allows it, and watched for changes."""

import errno
import logging
import mmap
import os
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from ..checkpoint.header import FileStamp
from ..errors import CheckpointChangedError, CheckpointError, ReadError
from ..extent import Extent, align_down

_log = logging.getLogger("penstock")

ALIGNMENT = 4096
"""Of offsets, lengths and addresses. Every O_DIRECT file system accepts it; 512, where
it is allowed, would save less than 8 KiB a read."""


_MEMORY_ALIGNMENTS = (4, 512)
"""Those that drives are known to have, the best first."""


@dataclass(frozen=True, slots=True)
class OpenFile:
    """An open file, and what it must look like as long as it is read."""

    path: Path
    descriptor: int
    is_direct: bool
    stamp: FileStamp

    def wanted(self, extent: Extent) -> int:
        """Bytes of `extent` that lie in the file."""
        return max(min(extent.end, self.stamp.size_bytes) - extent.offset, 0)

    def check(self) -> None:
        """Raises CheckpointChangedError when it is not what was opened. Called after a
        read: what was read before a change is what the header described."""
        if not self.stamp.is_of(os.fstat(self.descriptor)):
            raise CheckpointChangedError(
                f"{self.path} was changed while it was being read; load it again"
            )

    def advance(self, extent: Extent, position: int, count: int) -> int:
        """How far into `extent` one is after `count` more bytes have come. What comes
        short goes on at a whole block: a direct read cannot start within one. Raises
        CheckpointChangedError when there is nothing more to come."""
        end = position + count
        if end >= self.wanted(extent) or (count and not self.is_direct):
            return end
        if not count:
            raise CheckpointChangedError(
                f"{self.path} ends at {extent.offset + end} bytes but had "
                f"{self.stamp.size_bytes} when it was opened; load it again"
            )
        if align_down(end, ALIGNMENT) == position:  # once more; or is this the end?
            self.check()
        return align_down(end, ALIGNMENT)

    def failed(self, extent: Extent, error: OSError) -> ReadError:
        """What to raise when the device could not read `extent`; what it raised is in
        it. Raises CheckpointChangedError where the file is not what it was: then that
        is why."""
        self.check()
        found = ReadError(
            f"reading {extent.nbytes} bytes at {extent.offset} of {self.path} failed: "
            f"{error.strerror}"
        )
        found.__cause__ = error
        return found


class Files:
    """Opens the files that `stamps` describes, each when it is first read.

    `direct` asks for O_DIRECT; a file system that refuses it is read through the page
    cache, which is announced once and kept in `fallbacks`. Used by any thread.
    """

    def __init__(self, stamps: Mapping[Path, FileStamp], *, direct: bool) -> None:
        self._stamps = stamps
        self._direct = direct
        self._lock = threading.Lock()
        self._files: dict[Path, OpenFile] = {}
        self._fallbacks: list[str] = []

    def __len__(self) -> int:
        return len(self._files)

    @property
    def is_direct(self) -> bool:
        """Whether every file so far was opened with O_DIRECT."""
        with self._lock:  # others may be opened meanwhile
            return self._direct and all(f.is_direct for f in self._files.values())

    @property
    def fallbacks(self) -> tuple[str, ...]:
        return tuple(self._fallbacks)

    def open(self, path: Path) -> OpenFile:
        with self._lock:
            if path not in self._files:
                descriptor, is_direct = self._open(path)
                stamp = self._stamps[path]
                self._files[path] = OpenFile(path, descriptor, is_direct, stamp)
            return self._files[path]

    def close(self) -> None:
        for file in self._files.values():
            os.close(file.descriptor)
        self._files.clear()

    def _open(self, path: Path) -> tuple[int, bool]:
        try:
            if self._direct and (descriptor := open_direct(path)) is not None:
                return descriptor, True
            descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise CheckpointError(f"cannot open {path}: {error.strerror}") from error
        if self._direct and not self._fallbacks:
            message = f"no O_DIRECT on {path.parent}: reading through the page cache"
            self._fallbacks.append(message)
            _log.warning(message)
        return descriptor, False


def memory_alignment(path: Path) -> int:
    """Bytes: what the address of a direct read of `path` must be a multiple of, as far
    as reads show; 1 where it is read through the page cache. NVMe drives take 4 on
    Linux 6.0 and newer, others their sector of 512 bytes (statx(2), stx_dio_mem_align).
    """
    try:
        descriptor = open_direct(path)
    except OSError:  # whoever reads it says why
        return 1
    if descriptor is None:
        return 1
    try:
        with mmap.mmap(-1, 2 * ALIGNMENT) as pages, memoryview(pages) as view:
            for alignment in _MEMORY_ALIGNMENTS:
                with view[alignment : alignment + ALIGNMENT] as buffer:
                    try:
                        os.preadv(descriptor, [buffer], 0)
                    except OSError:
                        continue
                    return alignment
    finally:
        os.close(descriptor)
    return ALIGNMENT


def open_direct(path: Path) -> int | None:
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
    with mmap.mmap(-1, ALIGNMENT) as page:
        try:
            os.preadv(descriptor, [page], 0)
        except OSError:
            os.close(descriptor)
            return None
    return descriptor


def reads_directly(path: Path) -> bool:
    """Whether `path` can be read past the page cache. False, too, where it cannot be
    read at all: whoever reads it says why."""
    try:
        descriptor = open_direct(path)
    except OSError:
        return False
    if descriptor is None:
        return False
    os.close(descriptor)
    return True

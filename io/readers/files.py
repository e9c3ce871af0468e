"""Opens the files of a checkpoint for a reader.

Each file is opened once, with O_DIRECT where its file system allows it, and is checked
for changes after each read.
"""

import errno
import mmap
import os
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from ..checkpoint.header import FileStamp
from ..errors import CheckpointChangedError, CheckpointError, ReadError
from ..extent import Extent, align_down
from ..fallbacks import Fallbacks

ALIGNMENT = 4096
"""Bytes: alignment of offsets, lengths and addresses of direct reads. Every file system
with O_DIRECT accepts it; where 512 is allowed, it would save less than 8 KiB a read."""


_MEMORY_ALIGNMENTS = (4, 512)
"""Alignments of addresses that drives are known to accept, the best first."""


@dataclass(frozen=True, slots=True)
class OpenFile:
    """An open file, and the stamp that it must keep while it is read."""

    path: Path
    descriptor: int
    is_direct: bool
    stamp: FileStamp

    def wanted(self, extent: Extent) -> int:
        """Bytes of `extent` that lie in the file."""
        return max(min(extent.end, self.stamp.size_bytes) - extent.offset, 0)

    def check(self) -> None:
        """Raises CheckpointChangedError if the file has changed since it was opened.

        Call it after a read: bytes that were read before a change are correct.
        """
        if not self.stamp.is_of(os.fstat(self.descriptor)):
            raise CheckpointChangedError(
                f"{self.path} was changed while it was being read; load it again"
            )

    def advance(self, extent: Extent, position: int, count: int) -> int:
        """The next position in `extent` after a read of `count` bytes at `position`.

        After a short direct read, the position goes back to the start of a block,
        because a direct read cannot start inside one. Raises CheckpointChangedError if
        the file ends too early.
        """
        end = position + count
        if end >= self.wanted(extent) or (count and not self.is_direct):
            return end
        if not count:
            raise CheckpointChangedError(
                f"{self.path} ends at {extent.offset + end} bytes but had "
                f"{self.stamp.size_bytes} when it was opened; load it again"
            )
        if (
            align_down(end, ALIGNMENT) == position
        ):  # no progress: has the file got shorter?
            self.check()
        return align_down(end, ALIGNMENT)

    def failed(self, extent: Extent, error: OSError) -> ReadError:
        """The ReadError to raise when reading `extent` failed with `error`.

        Raises CheckpointChangedError instead if the file has changed.
        """
        self.check()
        failure = ReadError(
            f"reading {extent.nbytes} bytes at {extent.offset} of {self.path} failed: "
            f"{error.strerror}"
        )
        failure.__cause__ = error
        return failure


class Files:
    """Opens the files that `stamps` describes, each when it is first read.

    `direct` asks for O_DIRECT. If a file system refuses it, the file is read through
    the page cache, which the first time goes to `fallbacks`. Any thread may use it.
    """

    def __init__(
        self, stamps: Mapping[Path, FileStamp], *, direct: bool, fallbacks: Fallbacks
    ) -> None:
        self._stamps = stamps
        self._direct = direct
        self._lock = threading.Lock()
        self._files: dict[Path, OpenFile] = {}
        self._fallbacks = fallbacks

    def __len__(self) -> int:
        return len(self._files)

    @property
    def is_direct(self) -> bool:
        """Whether every file so far was opened with O_DIRECT."""
        with self._lock:  # another thread may open a file meanwhile
            return self._direct and all(f.is_direct for f in self._files.values())

    def open(self, path: Path) -> OpenFile:
        """The open file `path`. Raises CheckpointError if it cannot be opened."""
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
        if self._direct and all(file.is_direct for file in self._files.values()):
            self._fallbacks.announce(
                f"no O_DIRECT on {path.parent}: reading through the page cache"
            )
        return descriptor, False


def memory_alignment(path: Path) -> int:
    """The alignment in bytes of addresses that `path` is read to, found by test reads.

    1 if the file is read through the page cache. On Linux 6.0 and newer, NVMe drives
    accept 4; other drives need their sector of 512 bytes (statx(2), stx_dio_mem_align).
    """
    try:
        descriptor = open_direct(path)
    except OSError:  # the reader will report this
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
    """A descriptor that reads with O_DIRECT, or None if the file system refuses it.

    It may refuse at open or at the first read, so both are tried. Raises OSError if
    the file cannot be opened at all.
    """
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
    """Whether `path` can be read with O_DIRECT. False if it cannot be read at all."""
    try:
        descriptor = open_direct(path)
    except OSError:
        return False
    if descriptor is None:
        return False
    os.close(descriptor)
    return True

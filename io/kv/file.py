"""The file for all layer buffers on disk.

It has no name in its folder, so the system removes it when the process ends.
"""

import ctypes
import errno
import os
import tempfile
import threading
from collections import deque
from pathlib import Path

import torch

from ..closing import Closing
from ..errors import OutputError, ReadError
from ..extent import align_up
from ..memory.arena import Arena
from ..pace import Pace
from ..readers.files import ALIGNMENT
from ..timeline import Record, unrecorded
from .pages import PAGE_BYTES, FreeList
from .worker_stream import WorkerStream

_CHUNK_BYTES = 4 << 20


class KvFile(Closing):
    """Hands out ranges of whole pages of a file in `folder`.

    With `direct`, reads and writes bypass the page cache if the file system allows it;
    otherwise `fallback` says why not. One thread writes and one reads: give work to
    `writer` and `reader`.

    Raises OutputError when the file cannot be created.
    """

    def __init__(
        self,
        folder: Path,
        *,
        direct: bool,
        max_pending_bytes: int,
        write_pace: Pace | None,
        read_pace: Pace | None,
        record: Record = unrecorded,
    ) -> None:
        self.folder = folder
        self.fallback: str | None = None
        """Why the page cache is used although `direct` was asked for; else None."""
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._descriptor = self._open(direct)
        except OSError as error:
            raise OutputError(
                f"cannot make a file in {folder} ({error.strerror}); set io.cache to a "
                "folder that can be written"
            ) from error
        self._lock = threading.Lock()
        self._free = FreeList()
        self._returned: deque[tuple[int, int]] = deque()
        self._buffer = Arena(_CHUNK_BYTES)
        self.writer, self.reader = (
            WorkerStream(
                name, max_pending_bytes=max_pending_bytes, pace=pace, record=record
            )
            for name, pace in (("kv-write", write_pace), ("kv-read", read_pace))
        )
        self._is_closed = False

    def __repr__(self) -> str:
        state = "closed" if self._is_closed else f"{self.nbytes} bytes"
        return f"<KvFile: in {self.folder}, {state}>"

    @property
    def nbytes(self) -> int:
        """Bytes up to the end of the last range in use."""
        return self._free.end

    def take(self, nbytes: int) -> int:
        """Takes `nbytes` (whole pages) that are free, and returns their offset."""
        assert nbytes % PAGE_BYTES == 0, "whole pages"
        with self._lock:
            self._settle()
            return self._free.take(nbytes)

    def give_back(self, offset: int, nbytes: int) -> None:
        """Frees a range. Any thread may call this at any moment; so may `__del__`."""
        self._returned.append((offset, nbytes))
        if not self._is_closed:
            self.writer.give(self._shrink)

    def write(self, offset: int, parts: list[torch.Tensor]) -> None:
        """Writes `parts` (contiguous, host memory), one behind the other, to `offset`.

        Together they are whole pages. Only for the writer's thread. Raises OutputError.
        """
        total = sum(part.nbytes for part in parts)
        queue = [(part.data_ptr(), part.nbytes) for part in parts]
        start = 0
        while start < total:
            num = min(_CHUNK_BYTES, total - start)
            _gather(self._buffer.tensor(0, num).data_ptr(), num, queue)
            self._pwrite(offset + start, num)
            start += num

    def read(self, offset: int, target: torch.Tensor) -> None:
        """Reads the bytes at `offset` into `target` (uint8, in host memory).

        The offset, the address and the length are aligned to blocks. Only for the
        reader's thread. Raises ReadError.
        """
        view = _view(target)
        done = 0
        while done < target.nbytes:
            try:
                num = os.preadv(self._descriptor, [view[done:]], offset + done)
            except InterruptedError:
                continue
            except OSError as error:
                raise self._unread(offset, target.nbytes, error.strerror) from error
            if not num:
                raise self._unread(offset, target.nbytes, "the file ends before")
            done += num

    def close(self) -> None:
        """Finishes the given work. Call it after all layer buffers are closed."""
        if self._is_closed:
            return
        self._is_closed = True
        self.writer.close()
        self.reader.close()
        os.close(self._descriptor)
        self._buffer.close()

    def _open(self, direct: bool) -> int:
        named, name = tempfile.mkstemp(prefix="kv-", dir=self.folder)
        try:
            if direct and (descriptor := _open_direct(name)) is not None:
                os.close(named)
                return descriptor
        finally:
            os.unlink(name)
        if direct:
            self.fallback = (
                f"no O_DIRECT in {self.folder}: keys and values go through the page "
                "cache"
            )
        return named

    def _settle(self) -> None:
        while self._returned:
            self._free.give_back(*self._returned.popleft())

    def _shrink(self) -> None:
        """Truncates the file to the last range in use."""
        with self._lock:
            self._settle()
            size = os.fstat(self._descriptor).st_size
            os.ftruncate(self._descriptor, min(self._free.end, size))

    def _pwrite(self, offset: int, nbytes: int) -> None:
        done = 0
        while done < nbytes:
            view = self._buffer.view(done, nbytes - done)
            try:
                done += os.pwritev(self._descriptor, [view], offset + done)
            except InterruptedError:
                continue
            except OSError as error:
                raise OutputError(
                    f"writing {nbytes} bytes of keys and values to {self.folder} "
                    f"failed: {error.strerror}; set io.cache to a folder with more "
                    "room, lower kv.limits.disk, or sweep with a smaller width"
                ) from error
            finally:
                view.release()

    def _unread(self, offset: int, nbytes: int, why: str | None) -> ReadError:
        return ReadError(
            f"reading {nbytes} bytes of keys and values at {offset} of a file in "
            f"{self.folder} failed: {why}"
        )


def pages(nbytes: int) -> int:
    """`nbytes` rounded up to whole pages."""
    return align_up(nbytes, PAGE_BYTES)


def _gather(target: int, nbytes: int, queue: list[tuple[int, int]]) -> None:
    """Copies the next `nbytes` of `queue` to the address `target`.

    The queue holds (address, length) and loses what was copied.
    """
    while nbytes:
        address, length = queue[0]
        num = min(length, nbytes)
        ctypes.memmove(target, address, num)
        target, nbytes = target + num, nbytes - num
        if num == length:
            queue.pop(0)
        else:
            queue[0] = address + num, length - num


def _view(tensor: torch.Tensor) -> memoryview:
    """The bytes of `tensor`, which the caller must keep alive."""
    array = (ctypes.c_char * tensor.nbytes).from_address(tensor.data_ptr())
    return memoryview(array).cast("B")


def _open_direct(name: str) -> int | None:
    """A descriptor that writes with O_DIRECT, or None if that does not work.

    A write is tried here, because some file systems refuse only at the first write.
    """
    flag = getattr(os, "O_DIRECT", None)
    if flag is None:
        return None
    try:
        descriptor = os.open(name, os.O_RDWR | os.O_CLOEXEC | flag)
    except OSError as error:
        if error.errno == errno.EINVAL:
            return None
        raise
    with Arena(ALIGNMENT) as page:
        view = page.view(0, ALIGNMENT)
        try:
            os.pwritev(descriptor, [view], 0)
            os.ftruncate(descriptor, 0)
        except OSError as error:
            os.close(descriptor)
            if error.errno != errno.EINVAL:
                raise
            return None
        finally:
            view.release()
    return descriptor

"""The `gds` reader: reads from the drive into GPU memory (GPUDirect Storage).

The bytes pass neither host memory nor the CPU.
"""

import ctypes
import errno
import os
import threading
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Protocol

import torch

from ..checkpoint.header import FileStamp
from ..closing import Closing
from ..fallbacks import Fallbacks
from .files import ALIGNMENT, Files, OpenFile, reads_directly
from .queued_reader import QueuedReader, RequestPart, Workers


class DeviceFile(Protocol):
    """A file that is read into GPU memory. Any thread may use it."""

    def read(self, target: torch.Tensor, offset: int) -> int:
        """Reads from `offset` of the file into `target` (uint8 [bytes], contiguous).

        Returns the number of bytes read. Raises OSError.
        """

    def close(self) -> None: ...


class CuFile(Closing):
    """A file that torch has registered with NVIDIA's cuFile.

    `read` calls the library that torch has loaded. Torch's own `load_storage` holds the
    GIL during the read, and does not return the number of bytes. The constructor raises
    OSError or RuntimeError if the system, the driver or torch does not support this.
    """

    def __init__(self, path: str) -> None:
        from torch.cuda.gds import GdsFile

        self._read = ctypes.CDLL("libcufile.so.0", use_errno=True).cuFileRead
        self._read.restype = ctypes.c_ssize_t
        self._file: GdsFile | None = GdsFile(path, os.O_RDONLY)

    def read(self, target: torch.Tensor, offset: int) -> int:
        """Reads from `offset` into `target`; see `DeviceFile.read`."""
        assert self._file is not None, "a closed file is not read"
        assert self._file.handle is not None, "an open file is registered"
        with torch.cuda.device(target.device):
            torch.cuda.current_stream().query()  # initialises CUDA on this thread
            count: int = self._read(
                ctypes.c_void_p(self._file.handle),
                ctypes.c_void_p(target.data_ptr()),
                ctypes.c_size_t(len(target)),
                ctypes.c_int64(offset),
                ctypes.c_int64(0),
            )
        if count == -1:
            number = ctypes.get_errno()
            raise OSError(number, os.strerror(number))
        if count < 0:
            raise OSError(errno.EIO, f"cuFile's error {-count}")
        return count

    def close(self) -> None:
        self._file = None  # the last reference: torch closes it


def why_not(device: torch.device, path: Path) -> str | None:
    """Why `path` cannot be read directly into `device`; None if it can."""
    if device.type != "cuda" or not torch.cuda.is_available():
        return f"it reads into the memory of a GPU, and the device is {device.type}"
    return probe(device, path, open_file=CuFile)


def probe(
    device: torch.device, path: Path, *, open_file: Callable[[str], DeviceFile]
) -> str | None:
    """Reads one block of `path` as a test. Returns what went wrong, or None."""
    if not reads_directly(path):
        return f"no O_DIRECT on {path.parent}"
    target = torch.zeros(ALIGNMENT, dtype=torch.uint8, device=device)
    try:
        file = open_file(str(path))
        try:
            count = file.read(target, 0)
        finally:
            file.close()
        with path.open("rb") as same:
            wanted = same.read(ALIGNMENT)
    except (OSError, RuntimeError) as error:
        return f"cuFile cannot read from {path.parent}: {error}"
    if bytes(target[:count].tolist()) != wanted:
        return f"cuFile reads other bytes from {path.parent} than the system does"
    return None


class GdsReader(QueuedReader[torch.Tensor]):
    """Reads into GPU tensors (uint8 [bytes], contiguous) in `num_threads` threads.

    Chunks have at most `chunk_bytes`, rounded to whole pages. Reads follow no stream:
    nothing on the GPU may use a target between `submit` and the end of its handle.
    Without the driver nvidia-fs, cuFile may go through host memory; the bytes are the
    same.
    """

    name = "gds"

    def __init__(
        self,
        stamps: Mapping[Path, FileStamp],
        *,
        num_threads: int,
        chunk_bytes: int,
        fallbacks: Fallbacks,
        open_file: Callable[[str], DeviceFile] = CuFile,
    ) -> None:
        super().__init__(
            Files(stamps, direct=True, fallbacks=fallbacks),
            chunk_bytes=chunk_bytes,
            num_lanes=num_threads,
        )
        self._open_file = open_file
        self._device_files: dict[Path, DeviceFile] = {}
        self._opening = threading.Lock()
        self._workers = Workers(
            self._pread, self._files, self._count, num_threads=num_threads
        )

    def __repr__(self) -> str:
        return (
            f"<GdsReader: {self._num_lanes} threads, {len(self._files)} files, "
            f"{self._count.num_bytes} bytes>"
        )

    def _put(self, parts: Iterable[RequestPart[torch.Tensor]], urgent: bool) -> None:
        self._workers.put(parts, urgent)

    def _finish(self) -> None:
        self._workers.close()
        for file in self._device_files.values():
            file.close()
        self._device_files.clear()

    def _pread(self, file: OpenFile, target: torch.Tensor, offset: int) -> int:
        try:
            return self._registered(file).read(target, offset)
        except RuntimeError as error:  # torch raises this for failed registrations
            raise OSError(errno.EIO, str(error)) from error

    def _registered(self, file: OpenFile) -> DeviceFile:
        with self._opening:
            if file.path not in self._device_files:
                # By descriptor: another file may have this name by now.
                same = f"/proc/self/fd/{file.descriptor}"
                self._device_files[file.path] = self._open_file(same)
            return self._device_files[file.path]

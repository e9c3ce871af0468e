"""The `gds` reader: reads from the drive into GPU memory (GPUDirect Storage).

The bytes pass neither host memory nor the CPU.
"""

import errno
import threading
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Protocol

import torch

from ..checkpoint.header import FileStamp
from ..devices.accelerators import is_accelerator
from ..devices.cufile import CuFile
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


def why_not(device: torch.device, path: Path) -> str | None:
    """Why `path` cannot be read directly into `device`; None if it can."""
    if device.type != CuFile.device_type or not is_accelerator(str(device)):
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

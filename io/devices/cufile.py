"""Files that NVIDIA's library cuFile reads into the memory of a GPU."""

import ctypes
import errno
import os
from typing import Any, ClassVar

import torch

from ..closing import Closing
from .accelerators import module_of


class CuFile(Closing):
    """A file that torch has registered with NVIDIA's cuFile.

    `read` calls the library that torch has loaded. Torch's own `load_storage` holds the
    GIL during the read, and does not return the number of bytes. The constructor raises
    OSError or RuntimeError if the system, the driver or torch does not support this.
    """

    device_type: ClassVar = "cuda"
    """The accelerators that it reads into."""

    def __init__(self, path: str) -> None:
        self._module = module_of(self.device_type)
        self._read = ctypes.CDLL("libcufile.so.0", use_errno=True).cuFileRead
        self._read.restype = ctypes.c_ssize_t
        self._file: Any = self._module.gds.GdsFile(path, os.O_RDONLY)

    def read(self, target: torch.Tensor, offset: int) -> int:
        """Reads from `offset` into `target`; see `DeviceFile` of the readers."""
        assert self._file is not None, "a closed file is not read"
        assert self._file.handle is not None, "an open file is registered"
        with self._module.device(target.device):
            self._module.current_stream().query()  # initialises CUDA on this thread
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

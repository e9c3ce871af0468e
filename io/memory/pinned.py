"""Pins host memory, so that a GPU copies from it at full speed."""

import ctypes
import logging
import mmap
import os
import resource
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from typing import Any, Protocol

import torch

from ..closing import Closing
from ..extent import align_down, align_up

_log = logging.getLogger("penstock")
_PAGE = mmap.PAGESIZE
_PORTABLE = 1
"""cudaHostRegisterPortable: pinned for every GPU, not only the current one."""


class Registrar(Protocol):
    """Pins ranges of memory. Both methods return 0, or CUDA's error code."""

    def register(self, address: int, nbytes: int) -> int:
        """Pins `nbytes` from `address` on."""
        ...

    def unregister(self, address: int) -> int: ...


class CudaRegistrar:
    """Calls cudaHostRegister of `cudart`, torch's own CUDA runtime."""

    def __init__(self, cudart: Any) -> None:
        self._cudart = cudart

    def register(self, address: int, nbytes: int) -> int:
        return self._checked(self._cudart.cudaHostRegister(address, nbytes, _PORTABLE))

    def unregister(self, address: int) -> int:
        return self._checked(self._cudart.cudaHostUnregister(address))

    def _checked(self, result: object) -> int:
        code = int(result)  # type: ignore[call-overload]
        if code:  # CUDA keeps the error, and the next kernel launch would raise it
            _forget_last_error()
        return int(code)


def registrar_of(module: Any) -> Registrar | None:
    """The registrar of torch's `module` for an accelerator, such as `torch.cuda`.

    None if its runtime cannot pin memory that exists already.
    """
    start = getattr(module, "cudart", None)
    return None if start is None else CudaRegistrar(start())


def _forget_last_error() -> None:
    """Calls cudaGetLastError, which torch does not offer, in torch's CUDA runtime."""
    name = f"libcudart.so.{(torch.version.cuda or '').partition('.')[0]}"
    with suppress(OSError, AttributeError):
        ctypes.CDLL(name, mode=os.RTLD_NOLOAD | os.RTLD_NOW).cudaGetLastError()


class Pinned(Closing):
    """Pins the whole pages of `memory` (writable), from its start on.

    At most `max_bytes` are pinned, in chunks of `chunk_bytes`, rounded to whole pages.
    If the system refuses some, they stay unpinned and `fallback` says so. Nothing is
    pinned without a `registrar`.

    A copy to or from a GPU must not cross the end of a chunk: CUDA refuses ranges that
    are registered in part, or twice. Use `cut` to split it. This keeps a view of
    `memory`, so close it before the memory. Not for several threads at once.
    """

    def __init__(
        self,
        memory: memoryview,
        *,
        max_bytes: int,
        chunk_bytes: int,
        registrar: Registrar | None,
    ) -> None:
        self._chunk_bytes = max(align_down(chunk_bytes, _PAGE), _PAGE)
        self._nbytes = len(memory)
        self._opened = ExitStack()  # undoes everything, whatever fails
        self._opened.callback(memory[:].release)
        self.pinned_bytes = 0
        self.fallback: str | None = None
        self._address = _address_of(memory) if memory else 0
        self._start = align_up(self._address, _PAGE)
        end = max(align_down(self._address + self._nbytes, _PAGE), self._start)
        wanted = end - self._start
        if registrar is None:
            self.fallback = (
                "no host memory is pinned: this accelerator's runtime cannot pin "
                "memory that exists; copies from it are slower, and block the thread "
                "that starts them"
            )
            return
        allowed = min(wanted, align_down(max_bytes, _PAGE))
        try:
            code = self._pin(registrar, allowed)
        except BaseException:
            self.close()
            raise
        if code:
            self.fallback = (
                f"only {self.pinned_bytes} of {wanted} bytes of host memory are "
                f"pinned: the system refused more (CUDA error {code}, ulimit -l is "
                f"{_memlock()}); raise `ulimit -l`, or lower host_memory"
            )
        elif allowed < wanted:
            self.fallback = (
                f"only {self.pinned_bytes} of {wanted} bytes of host memory are "
                f"pinned: the cap is {max_bytes} bytes; raise the cap, or lower "
                "host_memory"
            )

    def __repr__(self) -> str:
        return f"<Pinned: {self.pinned_bytes}/{self._nbytes} bytes>"

    def cut(self, offset: int, nbytes: int) -> Iterator[tuple[int, int, bool]]:
        """Splits the bytes `offset` ... `offset + nbytes` of the memory at chunk ends.

        Yields (offset, nbytes, whether this range is pinned).
        """
        start, end = self._start - self._address, offset + nbytes
        pinned_end = start + self.pinned_bytes
        while offset < end:
            if start <= offset < pinned_end:
                chunk = align_down(offset - start, self._chunk_bytes)
                stop = min(start + chunk + self._chunk_bytes, pinned_end)
                is_pinned = True
            else:
                stop = start if offset < start and self.pinned_bytes else end
                is_pinned = False
            stop = min(stop, end)
            yield offset, stop - offset, is_pinned
            offset = stop

    def close(self) -> None:
        """Unpins every page, and releases the view of the memory."""
        self.pinned_bytes = 0
        self._opened.close()

    def _pin(self, registrar: Registrar, nbytes: int) -> int:
        """Pins `nbytes` from the start on. Returns 0, or CUDA's error code."""
        for offset in range(0, nbytes, self._chunk_bytes):
            address = self._start + offset
            chunk_bytes = min(self._chunk_bytes, nbytes - offset)
            if code := registrar.register(address, chunk_bytes):
                return code
            self._opened.callback(_unpin, registrar, address)
            self.pinned_bytes += chunk_bytes
        return 0


def _unpin(registrar: Registrar, address: int) -> None:
    if code := registrar.unregister(address):
        _log.warning("memory stays pinned: CUDA error %d", code)


def _address_of(memory: memoryview) -> int:
    return ctypes.addressof(ctypes.c_char.from_buffer(memory))


def _memlock() -> str:
    limit = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]
    return "unlimited" if limit == resource.RLIM_INFINITY else f"{limit} bytes"

"""Host memory that holds units, and the contract of memory on any device."""

import contextlib
import ctypes
import mmap
from typing import Protocol

import torch

from ..closing import Closing
from ..errors import ClosedError, DoesNotFitError

_HUGE_PAGE_BYTES = 2 << 20


class Memory(Protocol):
    """Memory of a device that units are loaded into and viewed in."""

    nbytes: int

    def tensor(self, offset: int, nbytes: int) -> torch.Tensor:
        """The bytes `offset` ... `offset + nbytes`, as a view: uint8 [nbytes].

        `nbytes` is at least 1. Raises ClosedError after `close`.
        """
        ...

    def close(self) -> None: ...


class HostMemory(Closing):
    """A mapping of `nbytes`, freed when this is closed and its last view is gone."""

    _map: mmap.mmap

    def __init__(self, nbytes: int) -> None:
        self.nbytes = nbytes
        self._view: memoryview | None = None

    def __repr__(self) -> str:
        state = "closed" if self._view is None else "open"
        return f"<{type(self).__name__}: {self.nbytes} bytes, {state}>"

    def view(self, offset: int, nbytes: int) -> memoryview:
        """The writable bytes `offset` ... `offset + nbytes`.

        Raises ClosedError after `close`.
        """
        if self._view is None:
            raise ClosedError("this arena is closed; load the model again")
        return self._view[offset : offset + nbytes]

    def tensor(self, offset: int, nbytes: int) -> torch.Tensor:
        """The same bytes as `view`, as a tensor: uint8 [nbytes], at least one byte."""
        return torch.frombuffer(self.view(offset, nbytes), dtype=torch.uint8)

    def close(self) -> None:
        """Frees the memory, at once or when the last tensor that views it is gone."""
        if self._view is None:
            return
        self._view.release()
        self._view = None
        try:
            self._map.close()
        except BufferError:
            del self._map  # somebody holds a view; the last one unmaps


class Arena(HostMemory):
    """Anonymous memory, aligned to a huge page.

    The kernel is advised to use huge pages, because 4 KiB pages cost TLB misses in
    every matrix product. It provides each page at its first write. Raises
    DoesNotFitError if the system refuses the memory.
    """

    def __init__(self, nbytes: int) -> None:
        super().__init__(nbytes)
        try:
            # The extra bytes are address space for the alignment. Private, because most
            # systems give no huge pages to shared memory.
            self._map = mmap.mmap(
                -1,
                nbytes + _HUGE_PAGE_BYTES,
                flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS,
            )
        except (OSError, OverflowError, ValueError) as error:
            raise DoesNotFitError(
                f"the system refused {nbytes} bytes of memory ({error}); lower "
                "device_memory"
            ) from error
        self._advise("MADV_HUGEPAGE")
        # A fork during a direct read may corrupt private memory: open(2), NOTES.
        self._advise("MADV_DONTFORK")
        anchor = ctypes.c_char.from_buffer(self._map)
        address = ctypes.addressof(anchor)
        del anchor  # it would keep the map from closing
        start = -address % _HUGE_PAGE_BYTES
        whole = memoryview(self._map)
        self._view = whole[start : start + nbytes]
        whole.release()

    def _advise(self, name: str) -> None:
        """Gives advice that some systems refuse, such as kernels without huge pages."""
        with contextlib.suppress(AttributeError, OSError):
            self._map.madvise(getattr(mmap, name))

"""Host memory that units stand in, and what any such memory can do."""

import contextlib
import ctypes
import mmap
from typing import Protocol

import torch

from ..closing import Closing
from ..errors import ClosedError, DoesNotFitError

_HUGE_PAGE_BYTES = 2 << 20


class Memory(Protocol):
    """Bytes of some device that units are put into and viewed in."""

    nbytes: int

    def tensor(self, offset: int, nbytes: int) -> torch.Tensor:
        """The bytes `offset` ... `offset + nbytes`, as uint8 (at least one)."""
        ...

    def close(self) -> None: ...


class HostMemory(Closing):
    """`nbytes` of a mapping that is given back when this is closed and the last view
    of it is gone."""

    _map: mmap.mmap

    def __init__(self, nbytes: int) -> None:
        self.nbytes = nbytes
        self._view: memoryview | None = None

    def __repr__(self) -> str:
        state = "closed" if self._view is None else "open"
        return f"<{type(self).__name__}: {self.nbytes} bytes, {state}>"

    def view(self, offset: int, nbytes: int) -> memoryview:
        """The writable bytes `offset` ... `offset + nbytes`."""
        if self._view is None:
            raise ClosedError("this arena is closed; load the model again")
        return self._view[offset : offset + nbytes]

    def tensor(self, offset: int, nbytes: int) -> torch.Tensor:
        """The same as `view`, as a tensor of uint8 (of at least one byte)."""
        return torch.frombuffer(self.view(offset, nbytes), dtype=torch.uint8)

    def close(self) -> None:
        """Gives the memory back, or leaves that to the last tensor that views it."""
        if self._view is None:
            return
        self._view.release()
        self._view = None
        try:
            self._map.close()
        except BufferError:
            del self._map  # the user holds a view: its death unmaps


class Arena(HostMemory):
    """Anonymous memory, aligned to a huge page and advised to use them (4 KiB pages
    cost TLB misses in every matrix product).

    Pages are taken from the system as they are first written.
    """

    def __init__(self, nbytes: int) -> None:
        super().__init__(nbytes)
        try:
            # Exactly as much as was asked for, plus address space to align in. Private:
            # most systems give no huge pages to shared memory.
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
        # A fork during a direct read into private memory may tear it: open(2), NOTES.
        self._advise("MADV_DONTFORK")
        anchor = ctypes.c_char.from_buffer(self._map)
        address = ctypes.addressof(anchor)
        del anchor  # an exported buffer would keep the map from closing
        start = -address % _HUGE_PAGE_BYTES
        whole = memoryview(self._map)
        self._view = whole[start : start + nbytes]
        whole.release()

    def _advise(self, name: str) -> None:
        """Advice is not taken on every system (a kernel without huge pages)."""
        with contextlib.suppress(AttributeError, OSError):
            self._map.madvise(getattr(mmap, name))

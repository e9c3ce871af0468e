"""A few strips at a time, in the device's memory, where attention reads them."""

from contextlib import suppress
from dataclasses import dataclass

import torch

from .closing import Closing
from .device import Device
from .files import ALIGNMENT
from .kv_region import Arrival

_NOTHING = torch.empty(0, dtype=torch.uint8)
_MOST = 3
"""Strips: of who computes, of who follows, and of who was before."""


@dataclass(eq=False, slots=True)
class Staged:
    """A strip's tokens from `first` on, as rows."""

    buffer: torch.Tensor
    """uint8, its address aligned."""
    lead: int
    """Bytes before the row of `first`."""
    first: int
    ready: Arrival | None = None
    """When the rows are there; None if nobody brings any."""
    is_used: bool = False
    """Whether it was read since it was brought: then it goes first."""
    is_dropped: bool = False


class Staging(Closing):
    """Lends out buffers, at most `max_bytes` of them unless who computes needs more;
    None: at most three.

    A buffer that is dropped is used again when nobody views it any more: a model may
    keep what one layer saw for another one.
    """

    def __init__(self, device: Device, max_bytes: int | None) -> None:
        self._device = device
        self._max_bytes = max_bytes
        self._staged: list[Staged] = []
        self._free: list[Staged] = []
        self.peak_bytes = 0

    def __repr__(self) -> str:
        return f"<Staging: {len(self._staged)} strips, {self.nbytes} bytes>"

    @property
    def nbytes(self) -> int:
        """Bytes of all buffers."""
        return sum(s.buffer.nbytes for s in (*self._staged, *self._free))

    def lend(self, nbytes: int, lead: int, first: int, *, ahead: bool) -> Staged | None:
        """A buffer for `nbytes`, `lead` included. None where it is for later (`ahead`)
        and there is no room without what is still to be used."""
        while self._is_full(nbytes):
            used = [staged for staged in self._staged if staged.is_used]
            if ahead and not used:
                return None
            if not self._staged:
                break
            self.drop((used or self._staged)[0])
        staged = Staged(self._buffer(nbytes), lead, first)
        self._staged.append(staged)
        self.peak_bytes = max(self.peak_bytes, self.nbytes)
        return staged

    def use(self, staged: Staged) -> None:
        """Who computes reads `staged`, which is there for what is queued from now on.
        Raises what bringing it raised; then it is dropped."""
        if staged.ready is not None:
            try:
                staged.ready.wait()
            except BaseException:
                self.drop(staged)
                raise
            staged.ready = None
        staged.is_used = True
        self._staged.remove(staged)
        self._staged.append(staged)

    def put(self, staged: Staged, offset: int, rows: torch.Tensor) -> None:
        """`rows` behind what is in `staged`, in the order of the device's work."""
        target = staged.buffer[offset : offset + rows.nbytes]
        self._device.compute.copy(target, rows)

    def drop(self, staged: Staged) -> None:
        """May be dropped twice."""
        if not staged.is_dropped:
            staged.is_dropped = True
            self._staged.remove(staged)
            self._free.append(staged)

    def close(self) -> None:
        """After all work with them."""
        for staged in list(self._staged):
            self.drop(staged)
        for staged in self._free:
            self._forget(staged)
        self._free.clear()

    def _is_full(self, nbytes: int) -> bool:
        if self._max_bytes is None:
            return len(self._staged) >= _MOST
        held = sum(staged.buffer.nbytes for staged in self._staged)
        return held + nbytes > self._max_bytes

    def _buffer(self, nbytes: int) -> torch.Tensor:
        free, self._free = self._free, []
        best: Staged | None = None
        for staged in sorted(free, key=lambda staged: staged.buffer.nbytes):
            if _num_views(staged.buffer) > 1:  # it goes with who views it
                self._forget(staged)
            elif best is None and staged.buffer.nbytes >= nbytes:
                best = staged
            elif len(self._staged) + len(self._free) < _MOST - 1:
                self._free.append(staged)
            else:
                self._forget(staged)
        return self._allocate(nbytes) if best is None else self._forget(best)

    def _forget(self, staged: Staged) -> torch.Tensor:
        """Its buffer, which nothing is on its way to any more: the memory may become
        another's. The strip that it was dropped by may keep `staged` for long."""
        if staged.ready is not None:
            with suppress(Exception):  # nobody waits for it any more
                staged.ready.wait()
        buffer, staged.buffer = staged.buffer, _NOTHING
        return buffer

    def _allocate(self, nbytes: int) -> torch.Tensor:
        size = nbytes + nbytes // 8  # caches grow
        with torch.inference_mode(False):
            whole = torch.empty(
                size + ALIGNMENT, dtype=torch.uint8, device=self._device_of_torch()
            )
        start = -whole.data_ptr() % ALIGNMENT
        return whole[start : start + size]

    def _device_of_torch(self) -> torch.device:
        name = self._device.name
        return torch.device("cpu" if self._device.is_host else name)


def _num_views(tensor: torch.Tensor) -> int:
    """Tensors that view the storage of `tensor`, itself included."""
    storage = tensor.untyped_storage()
    return int(torch._C._storage_Use_Count(storage._cdata)) - 1

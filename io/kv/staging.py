"""A few strips at a time, in the device's memory, where attention reads them."""

from contextlib import suppress
from dataclasses import dataclass

import torch

from ..closing import Closing
from ..devices.device import Device
from ..readers.files import ALIGNMENT
from .region import Arrival

_NOTHING = torch.empty(0, dtype=torch.uint8, device="cpu")
FEW_STRIPS = 3
"""Of who computes, of who follows, and of who was before: there is always room for so
many,"""
FEW_BYTES = 256 << 20
"""and for more in so many bytes, since micro-batches that share their products attend
one right after the other: all should be there by then."""


@dataclass(eq=False, slots=True)
class StagedRows:
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
    None: for a few strips, or `FEW_BYTES`.

    A buffer that is dropped is used again when nobody views it any more: a model may
    keep what one layer saw for another one.
    """

    def __init__(self, device: Device, max_bytes: int | None) -> None:
        self._device = device
        self._max_bytes = max_bytes
        self._staged: list[StagedRows] = []
        self._free: list[StagedRows] = []
        self.peak_bytes = 0

    def __repr__(self) -> str:
        return f"<Staging: {len(self._staged)} strips, {self.nbytes} bytes>"

    @property
    def nbytes(self) -> int:
        """Bytes of all buffers."""
        return sum(s.buffer.nbytes for s in (*self._staged, *self._free))

    def lend(
        self, nbytes: int, lead: int, first: int, *, ahead: bool
    ) -> StagedRows | None:
        """A buffer for `nbytes`, `lead` included. None where it is for later (`ahead`)
        and there is no room without what is still to be used, or is looked at."""
        while self._is_full(nbytes):
            worst = self._free_of_use() if ahead else self._least_wanted()
            if worst is None:
                if ahead:
                    return None
                break
            self.drop(worst)
        staged = StagedRows(self._buffer(nbytes), lead, first)
        self._staged.append(staged)
        self.peak_bytes = max(self.peak_bytes, self.nbytes)
        return staged

    def use(self, staged: StagedRows) -> None:
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

    def put(self, staged: StagedRows, offset: int, rows: torch.Tensor) -> None:
        """`rows` behind what is in `staged`, in the order of the device's work."""
        target = staged.buffer[offset : offset + rows.nbytes]
        self._device.compute.copy(target, rows)

    def drop(self, staged: StagedRows) -> None:
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

    def _free_of_use(self) -> StagedRows | None:
        """What may be dropped for somebody's later use: it was read, and who read it
        keeps no view, so that its memory is free at once."""
        return next(
            (s for s in self._staged if s.is_used and _num_views(s.buffer) == 1), None
        )

    def _least_wanted(self) -> StagedRows | None:
        """What was read, else what was brought last: it is used after the others."""
        used = (staged for staged in self._staged if staged.is_used)
        return next(used, self._staged[-1] if self._staged else None)

    def _is_full(self, nbytes: int) -> bool:
        held = sum(staged.buffer.nbytes for staged in self._staged)
        return self._is_too_much(len(self._staged) + 1, held + nbytes)

    def _is_too_much(self, num: int, nbytes: int) -> bool:
        if self._max_bytes is None:
            return num > FEW_STRIPS and nbytes > FEW_BYTES
        return nbytes > self._max_bytes

    def _buffer(self, nbytes: int) -> torch.Tensor:
        free, self._free = self._free, []
        num, held = 1 + len(self._staged), nbytes
        held += sum(staged.buffer.nbytes for staged in self._staged)
        best: StagedRows | None = None
        for staged in sorted(free, key=lambda staged: staged.buffer.nbytes):
            if _num_views(staged.buffer) > 1:  # it goes with who views it
                self._forget(staged)
            elif best is None and staged.buffer.nbytes >= nbytes:
                best = staged
            elif not self._is_too_much(num + 1, held + staged.buffer.nbytes):
                self._free.append(staged)
                num, held = num + 1, held + staged.buffer.nbytes
            else:
                self._forget(staged)
        return self._allocate(nbytes) if best is None else self._forget(best)

    def _forget(self, staged: StagedRows) -> torch.Tensor:
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
            # Not a slice: that would keep `whole`, and so seem to be viewed for ever.
            start = -whole.data_ptr() % ALIGNMENT
            buffer = whole.new_empty(0)
            buffer.set_(whole.untyped_storage(), start, (size,), (1,))
        return buffer

    def _device_of_torch(self) -> torch.device:
        name = self._device.name
        return torch.device("cpu" if self._device.is_host else name)


def _num_views(tensor: torch.Tensor) -> int:
    """Tensors that view the storage of `tensor`, itself included."""
    storage = tensor.untyped_storage()
    return int(torch._C._storage_Use_Count(storage._cdata)) - 1

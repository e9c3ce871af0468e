"""Device memory for a few layer buffers at a time, where attention reads them."""

from contextlib import suppress
from dataclasses import dataclass

import torch

from ..closing import Closing
from ..devices.device import Device
from ..readers.files import ALIGNMENT
from .storage import Arrival

_NOTHING = torch.empty(0, dtype=torch.uint8, device="cpu")
FEW_LAYERS = 3
"""Without a limit, there is room for this many layer buffers: the one in use, the next
one, and the previous one."""
FEW_BYTES = 256 << 20
"""Without a limit, more layer buffers may be staged, up to this many bytes. The reason:
micro-batches that share matrix products attend right after each other, and all should
be staged by then."""


@dataclass(eq=False, slots=True)
class StagedRows:
    """The rows of a layer buffer's tokens from `first` on, in device memory."""

    buffer: torch.Tensor
    """uint8 [bytes], at an aligned address."""
    lead: int
    """Bytes in the buffer before the row of `first`."""
    first: int
    ready: Arrival | None = None
    """The fetch under way; None if there is none."""
    is_used: bool = False
    """Whether it was read since it was fetched; such rows are dropped first."""
    is_dropped: bool = False


class Staging(Closing):
    """Lends device buffers to layer buffers, `max_bytes` of them together.

    The computing thread always gets a buffer, even beyond that limit. Without a limit
    (None), `FEW_LAYERS` buffers or `FEW_BYTES` are lent, whichever is more.

    A dropped buffer is used again once nobody views it. A model may keep the views of
    one layer for another layer.
    """

    def __init__(self, device: Device, max_bytes: int | None) -> None:
        self._device = device
        self._max_bytes = max_bytes
        self._staged: list[StagedRows] = []
        self._free: list[StagedRows] = []
        self.peak_bytes = 0

    def __repr__(self) -> str:
        return f"<Staging: {len(self._staged)} buffers, {self.nbytes} bytes>"

    @property
    def nbytes(self) -> int:
        """Bytes of all buffers, lent or free."""
        return sum(s.buffer.nbytes for s in (*self._staged, *self._free))

    def lend(
        self, nbytes: int, lead: int, first: int, *, ahead: bool
    ) -> StagedRows | None:
        """Lends a buffer for `nbytes`, `lead` included, for the tokens from `first` on.

        With `ahead`, the buffer is for later use. Then the result is None if there is
        room only after dropping rows that are not used yet or are still viewed.
        """
        while self._is_full(nbytes):
            victim = self._used_and_unviewed() if ahead else self._least_wanted()
            if victim is None:
                if ahead:
                    return None
                break
            self.drop(victim)
        staged = StagedRows(self._buffer(nbytes), lead, first)
        self._staged.append(staged)
        self.peak_bytes = max(self.peak_bytes, self.nbytes)
        return staged

    def use(self, staged: StagedRows) -> None:
        """Makes `staged` available to all work queued on the device from now on.

        If the fetch failed, `staged` is dropped and the error is raised.
        """
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
        """Copies `rows` (uint8 [bytes], on the device) to `offset` of the buffer.

        The copy is queued on the compute stream.
        """
        target = staged.buffer[offset : offset + rows.nbytes]
        self._device.compute.copy(target, rows)

    def drop(self, staged: StagedRows) -> None:
        """Frees the buffer of `staged`; harmless if it is dropped already."""
        if not staged.is_dropped:
            staged.is_dropped = True
            self._staged.remove(staged)
            self._free.append(staged)

    def close(self) -> None:
        """Frees all buffers. Call it after all work with them."""
        for staged in list(self._staged):
            self.drop(staged)
        for staged in self._free:
            self._forget(staged)
        self._free.clear()

    def _used_and_unviewed(self) -> StagedRows | None:
        """Rows that were read and that nobody views: their memory is free at once."""
        return next(
            (s for s in self._staged if s.is_used and _num_views(s.buffer) == 1), None
        )

    def _least_wanted(self) -> StagedRows | None:
        """Rows that were read; else those fetched last, which are used last."""
        used = (staged for staged in self._staged if staged.is_used)
        return next(used, self._staged[-1] if self._staged else None)

    def _is_full(self, nbytes: int) -> bool:
        held = sum(staged.buffer.nbytes for staged in self._staged)
        return self._is_too_much(len(self._staged) + 1, held + nbytes)

    def _is_too_much(self, num: int, nbytes: int) -> bool:
        if self._max_bytes is None:
            return num > FEW_LAYERS and nbytes > FEW_BYTES
        return nbytes > self._max_bytes

    def _buffer(self, nbytes: int) -> torch.Tensor:
        free, self._free = self._free, []
        num, held = 1 + len(self._staged), nbytes
        held += sum(staged.buffer.nbytes for staged in self._staged)
        best: StagedRows | None = None
        for staged in sorted(free, key=lambda staged: staged.buffer.nbytes):
            if _num_views(staged.buffer) > 1:  # the last view frees it
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
        """Takes the buffer away from `staged`, after any fetch into it has ended.

        Its layer buffer may keep `staged` itself for long.
        """
        if staged.ready is not None:
            with suppress(Exception):  # nobody needs these rows any more
                staged.ready.wait()
        buffer, staged.buffer = staged.buffer, _NOTHING
        return buffer

    def _allocate(self, nbytes: int) -> torch.Tensor:
        size = nbytes + nbytes // 8  # caches grow
        with torch.inference_mode(False):
            whole = torch.empty(
                size + ALIGNMENT, dtype=torch.uint8, device=self._device_of_torch()
            )
            # Not a slice: it would keep `whole` alive, which counts as a view.
            start = -whole.data_ptr() % ALIGNMENT
            buffer = whole.new_empty(0)
            buffer.set_(whole.untyped_storage(), start, (size,), (1,))
        return buffer

    def _device_of_torch(self) -> torch.device:
        name = self._device.name
        return torch.device("cpu" if self._device.is_host else name)


def _num_views(tensor: torch.Tensor) -> int:
    """The number of tensors that share the storage of `tensor`, itself included."""
    storage = tensor.untyped_storage()
    return int(torch._C._storage_Use_Count(storage._cdata)) - 1

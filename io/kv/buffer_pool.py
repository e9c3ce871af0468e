"""Pools of memory for copied rows: host memory, or memory of the device."""

from collections import deque
from collections.abc import Callable
from contextlib import suppress
from typing import Protocol

import torch

from ..closing import Closing
from ..devices.device import Device, Stream
from ..errors import ClosedError
from ..memory.arena import Arena, Memory
from ..memory.host_buffers import HostBuffers


class BufferPool(Protocol):
    """Lends memory. It may be given back on any thread.

    At that time, only copies already queued on the pool's two streams may still use it.
    """

    def take(self, nbytes: int) -> Memory:
        """Memory of at least `nbytes`. Raises DoesNotFitError if there is no more."""
        ...

    def give_back(self, memory: Memory) -> None:
        """Returns memory that `take` has lent."""
        ...

    def close(self) -> None: ...


class UnpinnedPool(Closing):
    """Host memory for a device that is the host; freed when it is given back."""

    def take(self, nbytes: int) -> Memory:
        return Arena(nbytes)

    def give_back(self, memory: Memory) -> None:
        memory.close()  # the last copy under way may free it later

    def close(self) -> None:
        """Does nothing: the pool keeps no memory."""


class PinnedPool(Closing):
    """Pinned host memory. Buffers are used again, because pinning takes long."""

    def __init__(
        self, pin: Callable[[Arena], Closing | None], out: Stream, back: Stream
    ) -> None:
        self._buffers = HostBuffers(pin)
        self._out = out
        self._back = back
        self._returned: deque[Arena] = deque()

    def take(self, nbytes: int) -> Arena:
        """A pinned arena of at least `nbytes`. Raises DoesNotFitError."""
        with suppress(IndexError):
            while True:
                buffer = self._returned.popleft()
                self._out.wait(self._back.record())
                self._buffers.give_back(buffer, self._out.record())
        return self._buffers.take(nbytes)

    def give_back(self, memory: Memory) -> None:
        assert isinstance(memory, Arena), "this pool lends arenas"
        self._returned.append(memory)

    def close(self) -> None:
        """Frees all buffers. Call it after all work with them."""
        self._returned.clear()
        self._buffers.close()


class DevicePool(Closing):
    """Memory of the device, for copies on its compute stream."""

    def __init__(self, device: Device) -> None:
        self._device = torch.device("cpu" if device.is_host else device.name)

    def take(self, nbytes: int) -> Memory:
        return _Allocation(nbytes, self._device)

    def give_back(self, memory: Memory) -> None:
        memory.close()

    def close(self) -> None:
        """Does nothing: the pool keeps no memory."""


class _Allocation:
    """Memory of torch's allocator, which reuses it in the compute stream's order."""

    def __init__(self, nbytes: int, device: torch.device) -> None:
        self.nbytes = nbytes
        with torch.inference_mode(False):
            self._memory: torch.Tensor | None = torch.empty(
                nbytes, dtype=torch.uint8, device=device
            )

    def tensor(self, offset: int, nbytes: int) -> torch.Tensor:
        if self._memory is None:
            raise ClosedError("this memory was given back")
        return self._memory[offset : offset + nbytes]

    def close(self) -> None:
        self._memory = None

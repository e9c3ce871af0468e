"""Memory for strips that are copied: of the host, or of the device itself."""

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
    """Lends memory that may be given back on any thread, once nothing is copied to or
    from it but what its two streams were given before."""

    def take(self, nbytes: int) -> Memory: ...

    def give_back(self, memory: Memory) -> None: ...

    def close(self) -> None: ...


class Unpinned(Closing):
    """Host memory for a device that is the host: it is gone at once."""

    def take(self, nbytes: int) -> Memory:
        return Arena(nbytes)

    def give_back(self, memory: Memory) -> None:
        memory.close()  # or with the last copy that is under way

    def close(self) -> None:
        """Nothing is kept."""


class PinnedPool(Closing):
    """Host memory that is locked in place, which takes long, and lent again."""

    def __init__(
        self, pin: Callable[[Arena], Closing | None], out: Stream, back: Stream
    ) -> None:
        self._buffers = HostBuffers(pin)
        self._out = out
        self._back = back
        self._returned: deque[Arena] = deque()

    def take(self, nbytes: int) -> Arena:
        with suppress(IndexError):
            while True:
                buffer = self._returned.popleft()
                self._out.wait(self._back.record())
                self._buffers.give_back(buffer, self._out.record())
        return self._buffers.take(nbytes)

    def give_back(self, memory: Memory) -> None:
        assert isinstance(memory, Arena), "lent here"
        self._returned.append(memory)

    def close(self) -> None:
        """After all work."""
        self._returned.clear()
        self._buffers.close()


class OfDevice(Closing):
    """The device's own memory, in the order of its work."""

    def __init__(self, device: Device) -> None:
        self._device = torch.device("cpu" if device.is_host else device.name)

    def take(self, nbytes: int) -> Memory:
        return _Allocation(nbytes, self._device)

    def give_back(self, memory: Memory) -> None:
        memory.close()

    def close(self) -> None:
        """Nothing is kept."""


class _Allocation:
    """By torch, which gives it out again in the order of the computing stream."""

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

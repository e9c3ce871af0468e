"""The way between the device's memory and the threads that read and write a file."""

from collections.abc import Callable
from typing import Protocol

import torch

from ..closing import Closing
from ..devices.device import Device, Stream
from ..event import Event
from ..memory.arena import Arena
from .lender import PinnedPool
from .region import Leaving


class Outgoing(Protocol):
    """Rows on their way out; closed when they are written."""

    def wait(self) -> torch.Tensor:
        """The rows, in host memory. On the writer's thread."""
        ...

    def close(self) -> None: ...


class Incoming(Protocol):
    """Rows on their way back; closed when they are sent."""

    buffer: torch.Tensor
    """Host memory to read them into."""

    def send(self) -> Event | None:
        """They are in `buffer`: brings them on. On the reader's thread."""
        ...

    def close(self) -> None: ...


class HostBounce(Protocol):
    def out(self, rows: torch.Tensor) -> Outgoing: ...

    def back(self, target: torch.Tensor) -> Incoming: ...

    def close(self) -> None: ...


class _There:
    """Is where it is to be."""

    def __init__(self, buffer: torch.Tensor) -> None:
        self.buffer = buffer

    def wait(self) -> torch.Tensor:
        return self.buffer

    def send(self) -> None:
        """There it is."""

    def close(self) -> None:
        """A thread may keep the frame that made this."""
        del self.buffer


class NoHop:
    """The device is the host."""

    def out(self, rows: torch.Tensor) -> Outgoing:
        return _There(rows)

    def back(self, target: torch.Tensor) -> Incoming:
        return _There(target)

    def close(self) -> None:
        """There is nothing between them."""


class ThroughHost(Closing):
    """By two streams and host memory that is locked in place."""

    def __init__(
        self,
        device: Device,
        out: Stream,
        back: Stream,
        pin: Callable[[Arena], Closing | None],
    ) -> None:
        self._device = device
        self._out = out
        self._back = back
        self._lender = PinnedPool(pin, out, back)
        self._leaving = Leaving(device)

    def out(self, rows: torch.Tensor) -> Outgoing:
        buffer = self._lender.take(rows.nbytes)
        self._out.wait(self._device.compute.record())
        self._out.copy(buffer.tensor(0, rows.nbytes), rows)
        copied = self._out.record()
        self._leaving.add(copied, rows)
        return _Out(self._lender, buffer, rows.nbytes, copied)

    def back(self, target: torch.Tensor) -> Incoming:
        buffer = self._lender.take(target.nbytes)
        before = self._device.compute.record()  # may use the same memory
        return _Back(self._lender, buffer, target, self._back, before)

    def close(self) -> None:
        """After all work."""
        self._device.synchronize()
        self._leaving.clear()
        self._lender.close()


class _Out:
    def __init__(
        self, lender: PinnedPool, buffer: Arena, nbytes: int, copied: Event
    ) -> None:
        self._lender = lender
        self._buffer = buffer
        self._nbytes = nbytes
        self._copied = copied

    def wait(self) -> torch.Tensor:
        self._copied.wait()
        return self._buffer.tensor(0, self._nbytes)

    def close(self) -> None:
        self._lender.give_back(self._buffer)


class _Back:
    def __init__(
        self,
        lender: PinnedPool,
        buffer: Arena,
        target: torch.Tensor,
        back: Stream,
        before: Event,
    ) -> None:
        self.buffer = buffer.tensor(0, target.nbytes)
        self._lender = lender
        self._memory = buffer
        self._target = target
        self._back = back
        self._before = before

    def send(self) -> Event:
        self._back.wait(self._before)
        self._back.copy(self._target, self.buffer)
        copied = self._back.record()
        copied.wait()  # what is read into the buffer next is not ordered by streams
        return copied

    def close(self) -> None:
        del self.buffer, self._target
        self._lender.give_back(self._memory)

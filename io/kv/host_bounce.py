"""Copies rows between the device and the threads that read and write a file."""

from collections.abc import Callable
from typing import Protocol

import torch

from ..closing import Closing
from ..devices.device import Device, Stream
from ..event import Event
from ..memory.arena import Arena
from .buffer_pool import PinnedPool
from .storage import Leaving


class Outgoing(Protocol):
    """Rows that leave the device; closed once they are written to the file."""

    def wait(self) -> torch.Tensor:
        """Waits for the rows: uint8 in host memory. On the writer's thread."""
        ...

    def close(self) -> None: ...


class Incoming(Protocol):
    """Rows that return to the device; closed once they are sent."""

    buffer: torch.Tensor
    """uint8, in host memory: read the rows into it."""

    def send(self) -> None:
        """Copies `buffer` to the device. On the reader's thread, which waits for it."""
        ...

    def close(self) -> None: ...


class HostBounce(Protocol):
    """Copies rows through host memory. All tensors are uint8 and one-dimensional."""

    def out(self, rows: torch.Tensor) -> Outgoing:
        """Starts to copy `rows` from the device to host memory."""
        ...

    def back(self, target: torch.Tensor) -> Incoming:
        """Provides host memory for rows that are to be copied to `target`."""
        ...

    def close(self) -> None: ...


class _Unmoved:
    """Rows that need no copy."""

    def __init__(self, buffer: torch.Tensor) -> None:
        self.buffer = buffer

    def wait(self) -> torch.Tensor:
        return self.buffer

    def send(self) -> None:
        """Does nothing: the rows are already where they belong."""

    def close(self) -> None:
        """Lets go of the buffer, even if a thread keeps the frame that made this."""
        del self.buffer


class NoBounce:
    """For a device whose memory is host memory: nothing is copied."""

    def out(self, rows: torch.Tensor) -> Outgoing:
        """Hands on `rows` themselves."""
        return _Unmoved(rows)

    def back(self, target: torch.Tensor) -> Incoming:
        """Hands out `target` itself as the buffer."""
        return _Unmoved(target)

    def close(self) -> None:
        """Does nothing."""


class ThroughHost(Closing):
    """Copies by the streams `out` and `back`, through pinned host memory."""

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
        self._pool = PinnedPool(pin, out, back)
        self._leaving = Leaving(device)

    def out(self, rows: torch.Tensor) -> Outgoing:
        """Queues a copy of `rows` (uint8 [bytes]) to pinned memory."""
        buffer = self._pool.take(rows.nbytes)
        self._out.wait(self._device.compute.record())
        self._out.copy(buffer.tensor(0, rows.nbytes), rows)
        copied = self._out.record()
        self._leaving.add(copied, rows)
        return _Out(self._pool, buffer, rows.nbytes, copied)

    def back(self, target: torch.Tensor) -> Incoming:
        """Takes pinned memory for rows that go to `target` (uint8 [bytes])."""
        buffer = self._pool.take(target.nbytes)
        before = self._device.compute.record()  # earlier work may use the same memory
        return _Back(self._pool, buffer, target, self._back, before)

    def close(self) -> None:
        """Frees the host memory. Call it after all work with it."""
        self._device.synchronize()
        self._leaving.clear()
        self._pool.close()


class _Out:
    def __init__(
        self, pool: PinnedPool, buffer: Arena, nbytes: int, copied: Event
    ) -> None:
        self._pool = pool
        self._buffer = buffer
        self._nbytes = nbytes
        self._copied = copied

    def wait(self) -> torch.Tensor:
        self._copied.wait()
        return self._buffer.tensor(0, self._nbytes)

    def close(self) -> None:
        self._pool.give_back(self._buffer)


class _Back:
    def __init__(
        self,
        pool: PinnedPool,
        buffer: Arena,
        target: torch.Tensor,
        back: Stream,
        before: Event,
    ) -> None:
        self.buffer = buffer.tensor(0, target.nbytes)
        self._pool = pool
        self._memory = buffer
        self._target = target
        self._back = back
        self._before = before

    def send(self) -> None:
        self._back.wait(self._before)
        self._back.copy(self._target, self.buffer)
        self._back.record().wait()  # the next read into the buffer follows no stream

    def close(self) -> None:
        del self.buffer, self._target
        self._pool.give_back(self._memory)

"""Stores the rows of one layer buffer, apart from where attention reads them."""

from abc import abstractmethod
from collections import deque

import torch

from ..closing import Closing
from ..devices.device import Device, Stream
from ..errors import ClosedError
from ..event import Event
from ..handle import Handle
from ..memory.arena import Memory
from .buffer_pool import BufferPool
from .pages import spans

_MAX_LEAVING = 2


class Arrival:
    """Rows that are being fetched to the device."""

    handle: Handle | None = None
    """Done when the last byte has arrived; None if `ready` tells."""
    ready: Event | None = None
    """Passes when the last byte has arrived; None if `handle` tells."""

    def __init__(self, device: Device) -> None:
        self._device = device

    def wait(self) -> None:
        """Makes the rows available to all work queued on the device from now on.

        Raises what failed.
        """
        if self.handle is not None:
            self.handle.wait()
        if self.ready is not None:
            self._device.compute.wait(self.ready)


class KvStorage(Closing):
    """A sequence of `nbytes` bytes, at most `capacity` until `grow` is called."""

    nbytes: int = 0
    capacity: int = 0

    @abstractmethod
    def grow(self, nbytes: int) -> None:
        """Makes room for `nbytes` more; nothing is moved.

        Raises DoesNotFitError when there is no memory.
        """

    @abstractmethod
    def append(self, rows: torch.Tensor) -> None:
        """Starts to write `rows` (uint8 [bytes], on the device) behind the others.

        The caller must not change `rows` afterwards.
        """

    @abstractmethod
    def fetch(self, start: int, end: int, target: torch.Tensor) -> Arrival:
        """Starts to copy the bytes `start` ... `end` to `target`.

        `target` is uint8 [bytes], on the device. The bytes go behind its first
        `lead(start)` ones.
        """

    def lead(self, start: int) -> int:
        """Bytes before `start` that a fetch from `start` on brings as well."""
        return 0

    def round(self, nbytes: int) -> int:
        """`nbytes` rounded up to a size that `grow` can add."""
        return nbytes

    def room(self, nbytes: int, more: int) -> int:
        """Bytes of a buffer that `nbytes` are fetched into, with room for `more`."""
        return nbytes + more

    @abstractmethod
    def truncate(self, nbytes: int) -> None:
        """Removes all bytes from `nbytes` on."""


class Leaving:
    """Keeps device rows alive until a side stream has copied them out.

    At most a few are kept at one time, so that they do not fill the device's memory.
    """

    def __init__(self, device: Device) -> None:
        self._device = device
        self._rows: deque[tuple[Event, torch.Tensor]] = deque()

    def add(self, copied: Event, rows: torch.Tensor) -> None:
        """Keeps `rows` (any tensor of the device) until `copied` has passed."""
        self._rows.append((copied, rows))
        while len(self._rows) > _MAX_LEAVING:
            event, _ = self._rows.popleft()
            self._device.compute.wait(event)  # the compute stream reuses its memory

    def clear(self) -> None:
        """Drops all rows. Call it after all work with them."""
        self._rows.clear()


class MemoryStorage(KvStorage):
    """Stores rows in memory of `pool`; `out` copies to it, `back` copies from it."""

    def __init__(
        self,
        device: Device,
        out: Stream,
        back: Stream,
        leaving: Leaving,
        pool: BufferPool,
    ) -> None:
        self._device = device
        self._out = out
        self._back = back
        self._leaving = leaving
        self._pool = pool
        self._segments: list[Memory] = []
        self._sizes: list[int] = []
        self._written: Event | None = None
        self._fetched: Event | None = None
        self._is_closed = False

    def grow(self, nbytes: int) -> None:
        self._segments.append(self._pool.take(nbytes))
        self._sizes.append(nbytes)
        self.capacity += nbytes

    def append(self, rows: torch.Tensor) -> None:
        """Queues a copy of `rows` (uint8 [bytes], on the device)."""
        self._check()
        self._out.wait(self._device.compute.record())
        for span in spans(self._sizes, self.nbytes, self.nbytes + rows.nbytes):
            part = rows[span.position : span.position + span.nbytes]
            memory = self._segments[span.segment]
            self._out.copy(memory.tensor(span.offset, span.nbytes), part)
        self._written = self._out.record()
        self._leaving.add(self._written, rows)
        self.nbytes += rows.nbytes

    def fetch(self, start: int, end: int, target: torch.Tensor) -> Arrival:
        """Queues a copy into `target` (uint8 [bytes], on the device)."""
        self._check()
        self._back.wait(self._device.compute.record())
        if self._written is not None:
            self._back.wait(self._written)
        for span in spans(self._sizes, start, end):
            part = target[span.position : span.position + span.nbytes]
            memory = self._segments[span.segment]
            self._back.copy(part, memory.tensor(span.offset, span.nbytes))
        arrival = Arrival(self._device)
        arrival.ready = self._fetched = self._back.record()
        return arrival

    def truncate(self, nbytes: int) -> None:
        self._check()
        if self._fetched is not None:
            self._out.wait(self._fetched)
        self.nbytes = nbytes

    def close(self) -> None:
        if not self._is_closed:
            self._is_closed = True
            segments, self._segments = self._segments, []
            for segment in segments:
                self._pool.give_back(segment)

    def _check(self) -> None:
        if self._is_closed:
            raise ClosedError(GONE)


GONE = (
    "this cache ended with its micro-batch, or with its model: keep what is made of "
    "it, not the cache"
)

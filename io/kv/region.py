"""Where the rows of one strip are kept, other than where attention reads them."""

from abc import abstractmethod
from collections import deque

import torch

from ..closing import Closing
from ..devices.device import Device, Stream
from ..errors import ClosedError
from ..event import Event
from ..handle import Handle
from ..memory.arena import Memory
from .lender import BufferPool
from .pages import spans

_MAX_LEAVING = 2


class Arrival:
    """What is on its way to the device's memory."""

    handle: Handle | None = None
    """Of who queues the last copy; None when it is queued."""
    ready: Event | None = None
    """When the last byte is there; None where nothing is queued."""

    def __init__(self, device: Device) -> None:
        self._device = device

    def wait(self) -> None:
        """It is there for the work that is queued from now on. Raises what failed."""
        if self.handle is not None:
            self.handle.wait()
        if self.ready is not None:
            self._device.compute.wait(self.ready)


class KvStorage(Closing):
    """A stream of `nbytes` bytes, of at most `capacity` unless it is grown."""

    nbytes: int = 0
    capacity: int = 0

    @abstractmethod
    def grow(self, nbytes: int) -> None:
        """Makes room for `nbytes` more; nothing is moved."""

    @abstractmethod
    def append(self, rows: torch.Tensor) -> None:
        """Starts to write `rows` (uint8, on the device), which stay as they are."""

    @abstractmethod
    def fetch(self, start: int, end: int, target: torch.Tensor) -> Arrival:
        """Starts to bring the bytes `start` ... `end` to `target`, behind its first
        `lead(start)` ones."""

    def lead(self, start: int) -> int:
        """Bytes before those from `start` on that come with them."""
        return 0

    def round(self, nbytes: int) -> int:
        """The next size that a piece can have."""
        return nbytes

    def room(self, nbytes: int, more: int) -> int:
        """Bytes of a buffer to which `nbytes` are fetched and `more` are added."""
        return nbytes + more

    @abstractmethod
    def truncate(self, nbytes: int) -> None:
        """Takes all bytes from `nbytes` on back."""


class Leaving:
    """What is copied out of the device by a stream beside it, and must stay until it
    is: at most a few at one time, so that the device's memory does not fill with it."""

    def __init__(self, device: Device) -> None:
        self._device = device
        self._rows: deque[tuple[Event, torch.Tensor]] = deque()

    def add(self, copied: Event, rows: torch.Tensor) -> None:
        self._rows.append((copied, rows))
        while len(self._rows) > _MAX_LEAVING:
            event, _ = self._rows.popleft()
            self._device.compute.wait(event)  # its memory is used again in that order

    def clear(self) -> None:
        """After all work."""
        self._rows.clear()


class MemoryRegion(KvStorage):
    """In memory that `lender` lends, to and from which `out` and `back` copy."""

    def __init__(
        self,
        device: Device,
        out: Stream,
        back: Stream,
        leaving: Leaving,
        lender: BufferPool,
    ) -> None:
        self._device = device
        self._out = out
        self._back = back
        self._leaving = leaving
        self._lender = lender
        self._pieces: list[Memory] = []
        self._sizes: list[int] = []
        self._written: Event | None = None
        self._fetched: Event | None = None
        self._is_closed = False

    def grow(self, nbytes: int) -> None:
        self._pieces.append(self._lender.take(nbytes))
        self._sizes.append(nbytes)
        self.capacity += nbytes

    def append(self, rows: torch.Tensor) -> None:
        self._check()
        self._out.wait(self._device.compute.record())
        for span in spans(self._sizes, self.nbytes, self.nbytes + rows.nbytes):
            part = rows[span.position : span.position + span.nbytes]
            memory = self._pieces[span.piece]
            self._out.copy(memory.tensor(span.offset, span.nbytes), part)
        self._written = self._out.record()
        self._leaving.add(self._written, rows)
        self.nbytes += rows.nbytes

    def fetch(self, start: int, end: int, target: torch.Tensor) -> Arrival:
        self._check()
        self._back.wait(self._device.compute.record())
        if self._written is not None:
            self._back.wait(self._written)
        for span in spans(self._sizes, start, end):
            part = target[span.position : span.position + span.nbytes]
            memory = self._pieces[span.piece]
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
            pieces, self._pieces = self._pieces, []
            for piece in pieces:
                self._lender.give_back(piece)

    def _check(self) -> None:
        if self._is_closed:
            raise ClosedError(GONE)


GONE = (
    "this cache ended with its micro-batch, or with its model: keep what is made of "
    "it, not the cache"
)

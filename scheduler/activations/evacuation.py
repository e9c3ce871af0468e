"""What suspended micro-batches keep alive moves to host memory, and back before they go
on: the device holds the one that computes, the one before it and the one after it.

Who waits for what, where micro-batches are served in the order a, b, c:
- the copy out of a waits for the work of a (and, with it, for the last copy in from
  its buffer, since whoever that was for has computed);
- the memory of a is given back when b has run: the compute stream waits for the copy
  out of a, which ran beside the work of b, and memory given back is used again in the
  order of that stream;
- memory for c is taken before b runs; the copy in of c waits for all work before that,
  which may have been in the same memory (and, with it, for the copy out of c);
- the work of c waits for its copy in.
The host waits for nothing.
"""

import time
from collections import deque
from contextlib import suppress
from dataclasses import dataclass, field

import torch

from ...io.closing import Closing
from ...io.devices.device import Device
from ...io.event import Event
from ...io.memory.arena import Arena
from ...io.memory.host_buffers import HostBuffers
from ...io.timeline import ACTIVATIONS, Record, unrecorded
from .ownership import Ownership, bytes_of

_ALIGNMENT = 512
MIN_BYTES = 16 << 10
"""Smaller storages stay: they cost more to move than they take."""


@dataclass(eq=False, slots=True)
class _Parcel:
    """What one suspended micro-batch has in its buffer."""

    buffer: Arena
    turn: int
    """The turn that it left after."""
    is_leaving: bool = True
    """Whether its memory on the device is to be given back."""
    copied: Event | None = None
    """When all of it is in the buffer; None if it never came to that."""
    arrived: Event | None = None
    """When all of it is back; None while it is not on its way."""
    is_away: bool = False
    """Whether any memory on the device was given back."""
    storages: list[tuple[torch.UntypedStorage, int, int]] = field(default_factory=list)
    """With the offset in the buffer and the length of each."""


@dataclass(frozen=True, slots=True)
class EvacuationStatistics:
    """Counters since the sweep was opened."""

    bytes_out: int
    bytes_in: int
    num_buffers_allocated: int


class ActivationOffload(Closing):
    """Moves the storages of suspended micro-batches, each known by a number.

    An interrupt may strike anywhere: what is in a buffer is there until the copy back
    has been queued, so `bring_back` can be called again.
    """

    def __init__(
        self,
        device: Device,
        buffers: HostBuffers,
        ownership: Ownership,
        record: Record = unrecorded,
    ) -> None:
        self._record = record
        self.ownership = ownership
        self._device = device
        self._buffers = buffers
        self._out = device.stream()
        self._back = device.stream()
        self._parcels: dict[int, _Parcel] = {}
        self._leaving: deque[_Parcel] = deque()
        self._turn = 0
        self._bytes_out = 0
        self._bytes_in = 0
        self.is_closed = False

    def __repr__(self) -> str:
        return f"<ActivationOffload: {len(self._parcels)} parcels in {self._buffers!r}>"

    def begin_turn(self, index: int, following: int | None) -> None:
        """Micro-batch `index` is about to compute, and then, probably, `following`."""
        self._turn += 1
        while self._leaving and self._leaving[0].turn < self._turn - 1:
            self._free(self._leaving.popleft())
        self.ownership.forget(index)
        self.bring_back(index)
        if following is not None and following in self._parcels:
            with suppress(RuntimeError, MemoryError):  # raised again when it must be
                self._fetch(self._parcels[following])

    def move_out(self, index: int, storages: list[torch.UntypedStorage]) -> None:
        """Starts to move what micro-batch `index` holds, which has just computed."""
        assert index not in self._parcels, "who computes has nothing in a buffer"
        if not storages:
            return
        offsets, end = [], 0
        for storage in storages:
            offsets.append(end)
            end += storage.nbytes() + -storage.nbytes() % _ALIGNMENT
        buffer = self._buffers.take(end)
        parcel = self._parcels[index] = _Parcel(buffer, self._turn)
        start = time.perf_counter()
        self._out.wait(self._device.compute.record())
        for storage, offset in zip(storages, offsets, strict=True):
            nbytes = storage.nbytes()
            self._out.copy(buffer.tensor(offset, nbytes), bytes_of(storage))
            parcel.storages.append((storage, offset, nbytes))
            self._bytes_out += nbytes
        parcel.copied = self._out.record()
        self._leaving.append(parcel)
        self._record(ACTIVATIONS, f"{index} out", start, time.perf_counter(), end)

    def bring_back(self, index: int) -> None:
        """What micro-batch `index` holds is there for the work queued from now on.
        Raises what the device raises when it has no memory; nothing is lost then."""
        parcel = self._parcels.get(index)
        if parcel is None:
            return
        self._fetch(parcel)
        # Its memory may still be copied from, if it was not away for long.
        self._device.compute.wait(parcel.copied or self._out.record())
        if parcel.arrived is not None:
            self._device.compute.wait(parcel.arrived)
        used = parcel.arrived or self._out.record()
        del self._parcels[index]
        parcel.storages = []  # what it refers to would look like somebody else's
        self._buffers.give_back(parcel.buffer, used)

    def statistics(self) -> EvacuationStatistics:
        return EvacuationStatistics(
            self._bytes_out, self._bytes_in, self._buffers.num_allocated
        )

    def close(self) -> None:
        """Brings everything back, and frees the buffers."""
        try:
            for index in list(self._parcels):
                self.bring_back(index)
        finally:
            self._device.synchronize()
            self._buffers.close()
            self.is_closed = True

    def _free(self, parcel: _Parcel) -> None:
        """Gives the device's memory back once it is in the buffer."""
        if not parcel.is_leaving or parcel.copied is None:
            return
        self._device.compute.wait(parcel.copied)
        parcel.is_away = True
        for storage, _, _ in parcel.storages:
            self._device.resize(storage, 0)

    def _fetch(self, parcel: _Parcel) -> None:
        """Starts to bring back what is away; what is not stays."""
        parcel.is_leaving = False
        if not parcel.is_away:
            return
        try:
            for storage, _, nbytes in parcel.storages:
                if storage.nbytes() != nbytes:
                    self._device.resize(storage, nbytes)
        except Exception:
            for storage, _, _ in parcel.storages:
                self._device.resize(storage, 0)
            raise
        start = time.perf_counter()
        self._back.wait(self._device.compute.record())
        for storage, offset, nbytes in parcel.storages:
            self._back.copy(bytes_of(storage), parcel.buffer.tensor(offset, nbytes))
            self._bytes_in += nbytes
        parcel.arrived = self._back.record()
        parcel.is_away = False
        nbytes = sum(nbytes for _, _, nbytes in parcel.storages)
        self._record(ACTIVATIONS, "in", start, time.perf_counter(), nbytes)

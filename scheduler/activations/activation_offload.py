"""Moves the activations of suspended micro-batches to host memory, and back before they
resume. The device holds those of three micro-batches: the one that computes, the one
before it and the one after it.

Order of events, where micro-batches a, b, c compute one after the other:
- The copy out of a waits for the kernels of a. These come after the last copy in from
  the same buffer, whose micro-batch has computed since.
- The device memory of a is freed when b has run. The compute stream then waits for the
  copy out of a, which ran while b computed. Freed memory is reused in stream order.
- Memory for c is allocated before b runs. The copy in of c waits for all kernels queued
  before that, which may have used the same memory, and so for the copy out of c.
- The kernels of c wait for its copy in.
The host waits for none of this.
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
"""Smaller storages stay on the device: moving them costs more than it saves."""


@dataclass(eq=False, slots=True)
class _MovedSet:
    """The storages of one suspended micro-batch, and their copy in a host buffer."""

    buffer: Arena
    turn: int
    """The number of the turn in which its micro-batch computed."""
    is_leaving: bool = True
    """Whether its device memory has yet to be freed."""
    copied: Event | None = None
    """The event after the copy out; None if that was interrupted."""
    arrived: Event | None = None
    """The event after the copy in; None if none was queued."""
    is_away: bool = False
    """Whether its device memory was freed."""
    storages: list[tuple[torch.UntypedStorage, int, int]] = field(default_factory=list)
    """(storage, offset in the buffer, bytes) of each."""


@dataclass(frozen=True, slots=True)
class ActivationOffloadStatistics:
    """Counters since the sweep was opened."""

    bytes_out: int
    bytes_in: int
    num_buffers_allocated: int


class ActivationOffload(Closing):
    """Moves the storages of suspended micro-batches, each identified by its index.

    An interrupt may come anywhere. A buffer keeps its contents until the copy back has
    been queued, so `bring_back` can be called again.
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
        self._moved_sets: dict[int, _MovedSet] = {}
        self._leaving: deque[_MovedSet] = deque()
        self._turn = 0
        self._bytes_out = 0
        self._bytes_in = 0
        self.is_closed = False

    def __repr__(self) -> str:
        num = len(self._moved_sets)
        return f"<ActivationOffload: {num} micro-batches in {self._buffers!r}>"

    def begin_turn(self, index: int, following: int | None) -> None:
        """Micro-batch `index` is about to compute, and then, probably, `following`."""
        self._turn += 1
        while self._leaving and self._leaving[0].turn < self._turn - 1:
            self._free(self._leaving.popleft())
        self.ownership.forget(index)
        self.bring_back(index)
        if following is not None and following in self._moved_sets:
            with suppress(RuntimeError, MemoryError):  # raised again by `bring_back`
                self._fetch(self._moved_sets[following])

    def move_out(self, index: int, storages: list[torch.UntypedStorage]) -> None:
        """Starts to copy out the `storages` of micro-batch `index`, which has just
        computed."""
        assert index not in self._moved_sets, "who computes has nothing in a buffer"
        if not storages:
            return
        offsets, end = [], 0
        for storage in storages:
            offsets.append(end)
            end += storage.nbytes() + -storage.nbytes() % _ALIGNMENT
        buffer = self._buffers.take(end)
        moved = self._moved_sets[index] = _MovedSet(buffer, self._turn)
        start = time.perf_counter()
        self._out.wait(self._device.compute.record())
        for storage, offset in zip(storages, offsets, strict=True):
            nbytes = storage.nbytes()
            self._out.copy(buffer.tensor(offset, nbytes), bytes_of(storage))
            moved.storages.append((storage, offset, nbytes))
            self._bytes_out += nbytes
        moved.copied = self._out.record()
        self._leaving.append(moved)
        self._record(ACTIVATIONS, f"{index} out", start, time.perf_counter(), end)

    def bring_back(self, index: int) -> None:
        """Work that is queued from now on finds the storages of micro-batch `index`.
        Raises the device's error if it has no memory; nothing is lost then."""
        moved = self._moved_sets.get(index)
        if moved is None:
            return
        self._fetch(moved)
        # The copy out may still read this memory, if it was never freed.
        self._device.compute.wait(moved.copied or self._out.record())
        if moved.arrived is not None:
            self._device.compute.wait(moved.arrived)
        used = moved.arrived or self._out.record()
        del self._moved_sets[index]
        moved.storages = []  # `Ownership` would take it for another owner
        self._buffers.give_back(moved.buffer, used)

    def statistics(self) -> ActivationOffloadStatistics:
        return ActivationOffloadStatistics(
            self._bytes_out, self._bytes_in, self._buffers.num_allocated
        )

    def close(self) -> None:
        """Brings all storages back and frees the buffers."""
        try:
            for index in list(self._moved_sets):
                self.bring_back(index)
        finally:
            self._device.synchronize()
            self._buffers.close()
            self.is_closed = True

    def _free(self, moved: _MovedSet) -> None:
        """Frees the device memory of `moved` once it is copied to the buffer."""
        if not moved.is_leaving or moved.copied is None:
            return
        self._device.compute.wait(moved.copied)
        moved.is_away = True
        for storage, _, _ in moved.storages:
            self._device.resize(storage, 0)

    def _fetch(self, moved: _MovedSet) -> None:
        """Starts to copy back `moved` if its device memory was freed."""
        moved.is_leaving = False
        if not moved.is_away:
            return
        try:
            for storage, _, nbytes in moved.storages:
                if storage.nbytes() != nbytes:
                    self._device.resize(storage, nbytes)
        except Exception:
            for storage, _, _ in moved.storages:
                self._device.resize(storage, 0)
            raise
        start = time.perf_counter()
        self._back.wait(self._device.compute.record())
        for storage, offset, nbytes in moved.storages:
            self._back.copy(bytes_of(storage), moved.buffer.tensor(offset, nbytes))
            self._bytes_in += nbytes
        moved.arrived = self._back.record()
        moved.is_away = False
        nbytes = sum(nbytes for _, _, nbytes in moved.storages)
        self._record(ACTIVATIONS, "in", start, time.perf_counter(), nbytes)

"""The contract of a device (its memory, its streams, their order), and the CPU.

Only `Event.wait` and `Device.synchronize` make the host wait for the device. Only
loading threads call `Event.wait`.
"""

import ctypes
from collections.abc import Callable
from typing import Protocol

import torch

from ..event import Event
from ..memory.arena import Arena, HostMemory, Memory
from ..memory.pinned import Pinned


class Stream(Protocol):
    """A queue of work that runs in order, at the same time as other streams."""

    def copy(self, target: torch.Tensor, source: torch.Tensor) -> None:
        """Copies `source` to `target`, both uint8 [bytes] of the same length.

        Nobody may change or free them until an event recorded afterwards has passed.
        """
        ...

    def run(self, work: Callable[[], None]) -> None:
        """Queues what `work` computes with tensors of the device; calls it once."""
        ...

    def record(self) -> Event:
        """An event that passes when all work queued so far is done."""
        ...

    def wait(self, event: Event) -> None:
        """Makes all work queued from now on begin after `event`. Does not block."""
        ...


class Device(Protocol):
    """A processor with its memory."""

    name: str
    is_host: bool
    """Whether its memory is host memory, so that weights there need no copy."""

    @property
    def compute(self) -> Stream:
        """The stream that the calling thread computes on."""
        ...

    def stream(self) -> Stream:
        """A new stream beside the compute stream."""
        ...

    def allocate(self, nbytes: int) -> Memory:
        """Allocates memory of this device.

        Raises DoesNotFitError if it has too little.
        """
        ...

    def pin(self, memory: HostMemory, max_bytes: int) -> Pinned | None:
        """Pins up to `max_bytes` of host memory, for copies at full speed.

        Returns None if this device has no use for pinned memory.
        """
        ...

    def settle(self, memory: HostMemory) -> str | None:
        """Asks for pages near this device for `memory`, which is not yet written.

        Returns None, or a sentence that says why this failed.
        """
        ...

    def free_bytes(self) -> int | None:
        """Bytes that can still be allocated; None if the memory is host memory."""
        ...

    def resize(self, storage: torch.UntypedStorage, nbytes: int) -> None:
        """Frees the memory of `storage` (`nbytes` 0), or allocates it again, undefined.

        This happens in the order of the calling thread's `compute` stream. Before it,
        `compute` must have waited for other streams that use the storage. After it,
        other streams must wait for `compute`.
        """
        ...

    def peak_bytes(self) -> int | None:
        """The most bytes that this process had allocated at one time.

        None if the device does not count them.
        """
        ...

    def synchronize(self) -> None:
        """Blocks the calling thread until all work of the device is done."""
        ...


class _Done:
    """The event of work that is already done."""

    def wait(self) -> None:
        pass


class CpuStream:
    """Does its work at once, in the calling thread; see `Stream`."""

    def copy(self, target: torch.Tensor, source: torch.Tensor) -> None:
        """Copies `source` to `target`: host memory, contiguous, equally many bytes."""
        # Not torch: it would split the copy over a thread pool that competes with the
        # computing thread. Not numpy: a storage that numpy has viewed can never be
        # resized again.
        assert target.nbytes == source.nbytes, "copies need equally many bytes"
        assert target.is_contiguous(), "copies need contiguous tensors"
        assert source.is_contiguous(), "copies need contiguous tensors"
        ctypes.memmove(target.data_ptr(), source.data_ptr(), source.nbytes)

    def run(self, work: Callable[[], None]) -> None:
        work()

    def record(self) -> Event:
        return _Done()

    def wait(self, event: Event) -> None:
        """Blocks until `event` has passed."""
        event.wait()


class CpuDevice:
    """The CPU of this machine; see `Device`."""

    name = "cpu"
    is_host = True

    @property
    def compute(self) -> CpuStream:
        return CpuStream()

    def stream(self) -> CpuStream:
        return CpuStream()

    def allocate(self, nbytes: int) -> Memory:
        return Arena(nbytes)

    def pin(self, memory: HostMemory, max_bytes: int) -> Pinned | None:
        return None

    def settle(self, memory: HostMemory) -> str | None:
        return None

    def free_bytes(self) -> int | None:
        return None

    def resize(self, storage: torch.UntypedStorage, nbytes: int) -> None:
        storage.resize_(nbytes)

    def peak_bytes(self) -> int | None:
        return None

    def synchronize(self) -> None:
        pass

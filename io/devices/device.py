"""What computes: its memory, its streams of work, and the order between them.

Nothing here makes the host wait for the device but `Event.wait`, and only a thread that
loads calls that.
"""

import ctypes
from typing import Protocol

import torch

from ..event import Event
from ..memory.arena import Arena, HostMemory, Memory
from ..memory.pinned import Pinned


class Stream(Protocol):
    """Work that is done in the order it is given, beside the work of other streams."""

    def copy(self, target: torch.Tensor, source: torch.Tensor) -> None:
        """Copies `source` to `target` (uint8, of one length). Both must stay as they
        are until an event recorded afterwards has passed."""
        ...

    def record(self) -> Event:
        """The point after all that was given so far."""
        ...

    def wait(self, event: Event) -> None:
        """What is given from now on begins after `event`. Does not block."""
        ...


class Device(Protocol):
    """A place where weights are computed with."""

    name: str
    is_host: bool
    """Its memory is the host's: what lies there need not be copied to be used."""

    @property
    def compute(self) -> Stream:
        """The stream that the calling thread computes on."""
        ...

    def stream(self) -> Stream:
        """A new stream beside it."""
        ...

    def allocate(self, nbytes: int) -> Memory:
        """Memory of this device. Raises DoesNotFitError when it has not as much."""
        ...

    def pin(self, memory: HostMemory, max_bytes: int) -> Pinned | None:
        """Locks memory of the host in place, for copies from it at full speed. None
        where that is of no use."""
        ...

    def settle(self, memory: HostMemory) -> str | None:
        """Asks for pages of `memory`, not yet written, that are near this device. A
        sentence where that is of use and could not be done."""
        ...

    def free_bytes(self) -> int | None:
        """Memory that can still be had; None if it is the host's."""
        ...

    def resize(self, storage: torch.UntypedStorage, nbytes: int) -> None:
        """Gives the memory of `storage` back (0), or takes it anew, what is in it
        undefined, in the order of the calling thread's `compute`: that must have waited
        for others' use of it before, others must wait for `compute` after."""
        ...

    def peak_bytes(self) -> int | None:
        """Most memory of the device that this process has had at one time, if the
        device counts that."""
        ...

    def synchronize(self) -> None:
        """Waits for all its work: before its memory is given back, never before."""
        ...


class _Done:
    """The event of work that is done when it is given."""

    def wait(self) -> None:
        pass


class CpuStream:
    """Does its work at once, in the calling thread."""

    def copy(self, target: torch.Tensor, source: torch.Tensor) -> None:
        # Not by torch, which would share it out to a team of threads that fights with
        # the one that computes; nor by numpy, whose view of a storage keeps it from
        # being resized ever after.
        assert target.nbytes == source.nbytes, "bytes, of one length"
        assert target.is_contiguous(), "in one piece"
        assert source.is_contiguous(), "in one piece"
        ctypes.memmove(target.data_ptr(), source.data_ptr(), source.nbytes)

    def record(self) -> Event:
        return _Done()

    def wait(self, event: Event) -> None:
        event.wait()


class CpuDevice:
    """The computer's own processor."""

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

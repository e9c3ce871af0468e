"""A CUDA GPU as a device, with side streams and events in place of barriers."""

from collections.abc import Iterable
from typing import Any

import torch

from ..errors import ClosedError, DoesNotFitError, PolicyError
from ..event import Event
from ..memory.arena import HostMemory, Memory
from ..memory.numa import bind, node_near
from ..memory.pinned import CudaRegistrar, Pinned

_PINNED_CHUNK_BYTES = 1 << 30
"""Bytes pinned by one call. Pinning makes the system provide the pages."""


class CudaEvent:
    """A point in the work of a CUDA stream. `wait` blocks the calling thread."""

    def __init__(self, event: torch.cuda.Event) -> None:
        self.event = event

    def wait(self) -> None:
        self.event.synchronize()


class CudaStream:
    """A stream of one GPU; see `Stream`."""

    def __init__(self, stream: torch.cuda.Stream) -> None:
        self._stream = stream

    def copy(self, target: torch.Tensor, source: torch.Tensor) -> None:
        """Queues a copy of `source` to `target`, of the same shape."""
        with torch.cuda.stream(self._stream):
            target.copy_(source, non_blocking=True)

    def record(self) -> Event:
        """An event that passes when all work queued so far is done."""
        # A thread that waits for it sleeps, and does not keep a core busy.
        event: torch.cuda.Event = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
        event.record(self._stream)
        return CudaEvent(event)

    def wait(self, event: Event) -> None:
        """Makes later work begin after `event`. Blocks for events of other devices."""
        if isinstance(event, CudaEvent):
            self._stream.wait_event(event.event)
        else:
            event.wait()


class CudaMemory:
    """One allocation on a GPU, aligned by torch's allocator to 512 bytes.

    Raises DoesNotFitError if the GPU has too little free memory.
    """

    def __init__(self, nbytes: int, device: torch.device) -> None:
        self.nbytes = nbytes
        self._device = device
        try:
            self._buffer: torch.Tensor | None = torch.empty(
                nbytes, dtype=torch.uint8, device=device
            )
            # The allocator may return memory that this stream still uses, and the
            # copies to come run on another stream.
            torch.cuda.current_stream(device).synchronize()
        except torch.OutOfMemoryError as error:
            free, total = torch.cuda.mem_get_info(device)
            raise DoesNotFitError(
                f"{device} has {free} of {total} bytes free, which is less than the "
                f"{nbytes} asked for: lower device_memory"
            ) from error

    def __repr__(self) -> str:
        state = "closed" if self._buffer is None else "open"
        return f"<CudaMemory: {self.nbytes} bytes on {self._device}, {state}>"

    def tensor(self, offset: int, nbytes: int) -> torch.Tensor:
        """The bytes `offset` ... `offset + nbytes`, as a view: uint8 [nbytes]."""
        if self._buffer is None:
            raise ClosedError("this arena is closed; load the model again")
        return self._buffer[offset : offset + nbytes]

    def close(self) -> None:
        if self._buffer is not None:
            torch.cuda.synchronize(self._device)
            self._buffer = None


class CudaDevice:
    """The GPU called `name`, such as "cuda" or "cuda:1"; see `Device`.

    Raises PolicyError if there is no such GPU.
    """

    is_host = False

    def __init__(self, name: str) -> None:
        if not torch.cuda.is_available():
            raise PolicyError(
                f"{name!r}: this torch ({torch.__version__}) finds no CUDA GPU; "
                "install torch for CUDA, or write cpu in its place"
            )
        device = torch.device(name)
        count = torch.cuda.device_count()
        index = torch.cuda.current_device() if device.index is None else device.index
        if index >= count:
            raise PolicyError(
                f"there is no {name!r}: this machine has {count} GPU(s), "
                f"cuda:0 to cuda:{count - 1}"
            )
        self._device = torch.device("cuda", index)
        self.name = str(self._device)

    @property
    def compute(self) -> CudaStream:
        return CudaStream(torch.cuda.current_stream(self._device))

    def stream(self) -> CudaStream:
        stream = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]
        return CudaStream(stream)

    def allocate(self, nbytes: int) -> Memory:
        return CudaMemory(nbytes, self._device)

    def pin(self, memory: HostMemory, max_bytes: int) -> Pinned | None:
        return Pinned(
            memory.view(0, memory.nbytes),
            max_bytes=max_bytes,
            chunk_bytes=_PINNED_CHUNK_BYTES,
            registrar=CudaRegistrar(),
        )

    def settle(self, memory: HostMemory) -> str | None:
        """Binds `memory` to the NUMA node near this GPU; see `Device.settle`."""
        p: Any = torch.cuda.get_device_properties(self._device)
        pci = f"{p.pci_domain_id:04x}:{p.pci_bus_id:02x}:{p.pci_device_id:02x}.0"
        node = node_near(pci)
        if node is None:
            return None
        return bind(memory.tensor(0, 1).data_ptr(), memory.nbytes, node)

    def free_bytes(self) -> int | None:
        free, _ = torch.cuda.mem_get_info(self._device)
        reserved = torch.cuda.memory_reserved(self._device)
        return int(free + reserved - torch.cuda.memory_allocated(self._device))

    def resize(self, storage: torch.UntypedStorage, nbytes: int) -> None:
        with torch.cuda.device(self._device):  # the pool of its current stream
            storage.resize_(nbytes)

    def peak_bytes(self) -> int | None:
        return int(torch.cuda.max_memory_allocated(self._device))

    def synchronize(self) -> None:
        torch.cuda.synchronize(self._device)


def not_peers(device: str, others: Iterable[str]) -> list[str]:
    """The devices of `others` whose memory `device` cannot access directly.

    Copies from them go through the host.
    """
    return [
        other
        for other in others
        if not torch.cuda.can_device_access_peer(
            torch.device(device), torch.device(other)
        )
    ]

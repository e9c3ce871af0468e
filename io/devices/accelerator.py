"""An accelerator as a device: side streams and events in place of barriers.

It uses torch's interface for any accelerator. What only some kinds have (registered
host memory, NUMA nodes) is asked for, and left out where it is missing.
"""

from collections.abc import Callable
from typing import Any

import torch

from ..errors import ClosedError, DoesNotFitError, PolicyError
from ..event import Event
from ..memory.arena import HostMemory, Memory
from ..memory.numa import bind, node_near
from ..memory.pinned import Pinned, registrar_of
from .accelerators import accelerators, memory_of, module_of

_PINNED_CHUNK_BYTES = 1 << 30
"""Bytes pinned by one call. Pinning makes the system provide the pages."""


class AcceleratorEvent:
    """A point in the work of a stream. `wait` blocks the calling thread."""

    def __init__(self, event: torch.Event) -> None:
        self.event = event

    def wait(self) -> None:
        self.event.synchronize()


class AcceleratorStream:
    """A stream of one accelerator; see `Stream`."""

    def __init__(self, stream: torch.Stream) -> None:
        self._stream = stream

    def copy(self, target: torch.Tensor, source: torch.Tensor) -> None:
        """Queues a copy of `source` to `target`, of the same shape."""
        self.run(lambda: _copy(target, source))

    def run(self, work: Callable[[], None]) -> None:
        # As a new object: torch keeps what `with` restores in the object, which other
        # threads may have entered meanwhile.
        own = torch.Stream(
            stream_id=self._stream.stream_id,
            device_index=self._stream.device_index,
            device_type=self._stream.device_type,
        )
        with own:
            work()

    def record(self) -> Event:
        """An event that passes when all work queued so far is done."""
        # Not an event of a subclass such as torch.cuda.Event: `torch.Stream` takes its
        # memory for that of a `torch.Event`, and does not check. `blocking` lets a
        # thread that waits sleep; torch ignores it so far.
        event = torch.Event(self._stream.device, enable_timing=False, blocking=True)
        event.record(self._stream)
        return AcceleratorEvent(event)

    def wait(self, event: Event) -> None:
        """Makes later work begin after `event`. Blocks for events of other devices."""
        if isinstance(event, AcceleratorEvent):
            self._stream.wait_event(event.event)
        else:
            event.wait()


class AcceleratorMemory:
    """One allocation on an accelerator, aligned by torch's allocator (CUDA: 512 bytes).

    Raises DoesNotFitError if the accelerator has too little free memory.
    """

    def __init__(self, nbytes: int, device: torch.device) -> None:
        self.nbytes = nbytes
        self._device = device
        try:
            with torch.inference_mode(False):  # other threads write into it
                self._buffer: torch.Tensor | None = torch.empty(
                    nbytes, dtype=torch.uint8, device=device
                )
            # The allocator may return memory that this stream still uses, and the
            # copies to come run on another stream.
            torch.accelerator.current_stream(device).synchronize()
        except torch.OutOfMemoryError as error:
            free, total = memory_of(str(device))
            raise DoesNotFitError(
                f"{device} has {free} of {total} bytes free, which is less than the "
                f"{nbytes} asked for: lower device_memory (for another GPU: peer), or "
                "end what else uses it"
            ) from error

    def __repr__(self) -> str:
        state = "closed" if self._buffer is None else "open"
        return f"<AcceleratorMemory: {self.nbytes} bytes on {self._device}, {state}>"

    def tensor(self, offset: int, nbytes: int) -> torch.Tensor:
        """The bytes `offset` ... `offset + nbytes`, as a view: uint8 [nbytes]."""
        if self._buffer is None:
            raise ClosedError("this arena is closed; load the model again")
        return self._buffer[offset : offset + nbytes]

    def close(self) -> None:
        if self._buffer is not None:
            try:
                torch.accelerator.synchronize(self._device)
            finally:  # a device that has failed raises here for ever
                self._buffer = None


class AcceleratorDevice:
    """The accelerator called `name`, such as "cuda" or "cuda:1"; see `Device`.

    Its free memory is divided among `num_sharing` processes. Raises PolicyError if
    there is no such accelerator.
    """

    is_host = False

    def __init__(self, name: str, num_sharing: int = 1) -> None:
        self._num_sharing = num_sharing
        self._device = _device_of(name)
        self.name = str(self._device)
        self._module = module_of(self.name)

    @property
    def compute(self) -> AcceleratorStream:
        return AcceleratorStream(torch.accelerator.current_stream(self._device))

    def stream(self) -> AcceleratorStream:
        return AcceleratorStream(torch.Stream(self._device))

    def allocate(self, nbytes: int) -> Memory:
        return AcceleratorMemory(nbytes, self._device)

    def pin(self, memory: HostMemory, max_bytes: int) -> Pinned | None:
        """Pins by the runtime's registration; announces where there is none."""
        return Pinned(
            memory.view(0, memory.nbytes),
            max_bytes=max_bytes,
            chunk_bytes=_PINNED_CHUNK_BYTES,
            registrar=registrar_of(self._module),
        )

    def settle(self, memory: HostMemory) -> str | None:
        """Binds `memory` to the NUMA node near this device; see `Device.settle`."""
        found: Any = self._module.get_device_properties(self._device)
        if not hasattr(found, "pci_bus_id"):
            return None
        pci = (
            f"{found.pci_domain_id:04x}:{found.pci_bus_id:02x}"
            f":{found.pci_device_id:02x}.0"
        )
        node = node_near(pci)
        if node is None:
            return None
        return bind(memory.tensor(0, 1).data_ptr(), memory.nbytes, node)

    def free_bytes(self) -> int | None:
        free, _ = memory_of(self.name)
        reserved = torch.accelerator.memory_reserved(self._device)
        unused = reserved - torch.accelerator.memory_allocated(self._device)
        return int(free // self._num_sharing + unused)

    def resize(self, storage: torch.UntypedStorage, nbytes: int) -> None:
        with torch.accelerator.device_index(self._device.index):  # its current stream
            storage.resize_(nbytes)

    def peak_bytes(self) -> int | None:
        return int(torch.accelerator.max_memory_allocated(self._device))

    def synchronize(self) -> None:
        torch.accelerator.synchronize(self._device)


def _copy(target: torch.Tensor, source: torch.Tensor) -> None:
    target.copy_(source, non_blocking=True)


def _device_of(name: str) -> torch.device:
    there = accelerators()
    try:
        device = torch.device(name)
    except RuntimeError:
        message = f"{name!r} is not a device: write cpu, cuda or cuda:1"
        raise PolicyError(message) from None
    kinds = {torch.device(each).type for each in there}
    if device.type not in kinds:
        found = f"finds {', '.join(there)}" if there else "finds no accelerator"
        fix = "write one of them" if there else "install torch for CUDA, or write cpu"
        raise PolicyError(
            f"{name!r}: this torch ({torch.__version__}) {found}; {fix} in its place"
        )
    if device.index is None:
        device = torch.device(device.type, torch.accelerator.current_device_index())
    if str(device) not in there:
        raise PolicyError(
            f"there is no {name!r}: this machine has {len(there)} of them, "
            f"{there[0]} to {there[-1]}"
        )
    return device

"""Copies of tensors between a device and host memory, while the device computes."""

from collections.abc import Callable, Sequence
from typing import TypeVar

import torch

from .device import Device, Stream
from .host_copy import HostCopy
from .queued_copy import queued_to

T = TypeVar("T")


class Crossing:
    """Moves tensors from `device` to host memory and from there to it, each way on a
    stream of its own. The host waits for neither. On the CPU nothing is copied."""

    def __init__(self, device: Device) -> None:
        self._device = device
        self._out: Stream | None = None if device.is_host else device.stream()
        self._back: Stream | None = None if device.is_host else device.stream()

    @property
    def is_copied(self) -> bool:
        """Whether the device has other memory than the host."""
        return self._out is not None

    def to_host(self, tensor: torch.Tensor) -> HostCopy:
        """A copy of `tensor`, on its way to pinned memory. The device may change
        `tensor` afterwards. On the CPU it is `tensor` itself."""
        if self._out is None:
            return HostCopy(tensor)
        own = tensor.clone(memory_format=torch.contiguous_format)
        self._out.wait(self._device.compute.record())

        def copy() -> HostCopy:
            _use_here(own)
            return HostCopy(own)

        return _run(self._out, copy)

    def to_device(self, tensor: torch.Tensor) -> torch.Tensor:
        """`tensor`, which is in host memory, on the device: what is computed from now
        on finds it there. Pinned memory makes nobody wait."""
        if self._back is None:
            return tensor
        there = _run(self._back, lambda: queued_to(tensor, self._device.name))
        self._device.compute.wait(self._back.record())
        _use_here(there)
        return there

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """Host memory to receive a tensor in, pinned if the device copies it."""
        return torch.empty(shape, dtype=dtype, device="cpu", pin_memory=self.is_copied)


def _use_here(tensor: torch.Tensor) -> None:
    """The memory of `tensor`, which is another stream's, is not used again before what
    the current stream has queued when it is freed."""
    tensor.record_stream(torch.accelerator.current_stream(tensor.device))


def _run(stream: Stream, work: Callable[[], T]) -> T:
    found: list[T] = []
    stream.run(lambda: found.append(work()))
    return found[0]

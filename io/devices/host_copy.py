"""Copies to host memory that the host does not wait for."""

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass

import torch


class HostCopy:
    """A copy of `tensor` in host memory: queued on the calling thread's current stream
    behind what makes `tensor`. On the CPU it is `tensor` itself."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self._tensor = tensor
        self._event: torch.Event | None = None
        self.is_copy = tensor.device.type != "cpu"
        if not self.is_copy:
            return
        # Pinned: a copy to other memory would make the host wait.
        self._tensor = torch.empty(
            tensor.shape, dtype=tensor.dtype, device="cpu", pin_memory=True
        )
        self._tensor.copy_(tensor, non_blocking=True)
        self._event = torch.Event(tensor.device, enable_timing=False)
        self._event.record(torch.accelerator.current_stream(tensor.device))

    @property
    def has_arrived(self) -> bool:
        """Whether `wait` would return at once. Does not block."""
        if self._event is not None and self._event.query():
            self._event = None
        return self._event is None

    def wait(self) -> torch.Tensor:
        """The copy, in host memory. Blocks the calling thread until it has arrived, and
        raises what the device's work has failed with."""
        if not self.has_arrived and self._event is not None:
            self._event.synchronize()
            self._event = None
        return self._tensor

    def wait_quietly(self) -> None:
        """As `wait`, without an error: the next `wait` raises it."""
        with suppress(Exception):
            self.wait()


@dataclass(frozen=True, slots=True)
class Finding:
    """What a micro-batch has computed, on its way to host memory."""

    copies: Sequence[HostCopy]
    note: Callable[..., None]
    """Called once with all copies, in host memory."""

    @property
    def has_arrived(self) -> bool:
        return all(copy.has_arrived for copy in self.copies)

    def take(self) -> None:
        """Waits for the copies and notes them."""
        self.note(*(copy.wait() for copy in self.copies))

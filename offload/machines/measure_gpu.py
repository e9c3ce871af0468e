"""Measures copies between host memory and a GPU, and asks the driver for the GPU's
facts.

Runs only where there is a GPU. The calls that need one are behind `CopyStarter`, so
that the arithmetic can be tested without one.
"""

import time
from collections.abc import Callable
from functools import partial
from typing import Any, Protocol

import torch

from ...io.devices.accelerators import accelerators, memory_of, reaches, title_of
from ...io.extent import align_down
from ...io.readers.files import ALIGNMENT
from .machine import Copies

_BYTES = 256 << 20
_SHARE = 8
"""One of so many free bytes is copied where less than 2 GiB are free."""
_TIMES = 5


class CopyStarter(Protocol):
    """Starts copies, and waits for them. Each has the same number of bytes."""

    def copy(self, way: str, *, pinned: bool) -> None:
        """Starts a copy to the device (`in`), to the host (`out`), or from a `peer`."""

    def wait(self) -> None: ...

    @property
    def has_peer(self) -> bool: ...


def measure_copies(device: str) -> Copies:
    """The bandwidths of copies to and from the GPU `device`."""
    nbytes = copied_bytes(device)
    return copies_of(AcceleratorCopier(device, nbytes), nbytes)


def copied_bytes(device: str) -> int:
    """How many bytes a copy has that is timed: 256 MiB, or less if the GPU `device` or
    another one has little memory free."""
    free = min(memory_of(name)[0] for name in {device, *accelerators()})
    return align_down(min(_BYTES, free // _SHARE), ALIGNMENT)


def copies_of(
    copier: CopyStarter, nbytes: int, clock: Callable[[], float] = time.perf_counter
) -> Copies:
    """The bandwidths in bytes per second of copies of `nbytes`; the best of five
    runs."""

    def rate(*ways: str, pinned: bool = True) -> int:
        best = float("inf")
        for _ in range(_TIMES):
            copier.wait()
            start = clock()
            for way in ways:
                copier.copy(way, pinned=pinned)
            copier.wait()
            best = min(best, clock() - start)
        return round(nbytes / best)

    return Copies(
        pinned_to_device=rate("in"),
        pinned_to_host=rate("out"),
        both_ways=rate("in", "out"),
        pageable_to_device=rate("in", pinned=False),
        pageable_to_host=rate("out", pinned=False),
        peer=rate("peer") if copier.has_peer else None,
    )


class AcceleratorCopier:
    """Copies on separate streams of an accelerator, so that both directions run
    together."""

    def __init__(self, device: str, nbytes: int) -> None:
        self._device = torch.device(device)
        there = partial(torch.empty, nbytes, dtype=torch.uint8, device=device)
        here = partial(torch.empty, nbytes, dtype=torch.uint8)
        self._there = [there(), there()]
        self._here = {
            pinned: [here(pin_memory=pinned), here(pin_memory=pinned)]
            for pinned in (True, False)
        }
        ways = ("in", "out", "peer")
        self._streams = {way: torch.Stream(self._device) for way in ways}
        self._peer = self._peer_tensor(nbytes)

    @property
    def has_peer(self) -> bool:
        return self._peer is not None

    def copy(self, way: str, *, pinned: bool) -> None:
        """Starts a copy of uint8 tensors; see `CopyStarter.copy`."""
        there, here = self._there, self._here[pinned]
        with self._streams[way]:
            if way == "in":
                there[0].copy_(here[0], non_blocking=True)
            elif way == "out":
                here[1].copy_(there[1], non_blocking=True)
            else:
                assert self._peer is not None, "call it only if `has_peer`"
                there[0].copy_(self._peer, non_blocking=True)

    def wait(self) -> None:
        torch.accelerator.synchronize(self._device)

    def _peer_tensor(self, nbytes: int) -> torch.Tensor | None:
        own = f"{self._device.type}:{self._device.index or 0}"
        for other in accelerators():
            if other != own and reaches(own, other):
                return torch.empty(nbytes, dtype=torch.uint8, device=other)
        return None


def gpu_facts(device: str) -> dict[str, Any]:
    """The name, memory (bytes) and number of GPUs. NVIDIA's management library tells
    them if it is installed, else torch."""
    kind, index = torch.device(device).type, torch.device(device).index or 0
    facts: dict[str, Any] = {"device": kind}
    try:
        if kind != "cuda":
            raise ImportError("the library knows NVIDIA's only")
        import pynvml

        pynvml.nvmlInit()
    except Exception:  # not installed, or no driver: torch knows as much
        facts |= {"name": title_of(device), "device_memory": memory_of(device)[1]}
        facts["num_devices"] = len(accelerators())
        return facts
    try:
        handle = pynvml.nvmlDeviceGetHandleByIndex(index)
        name = pynvml.nvmlDeviceGetName(handle)
        facts["name"] = name if isinstance(name, str) else name.decode()
        facts["device_memory"] = int(pynvml.nvmlDeviceGetMemoryInfo(handle).total)
        facts["num_devices"] = int(pynvml.nvmlDeviceGetCount())
    finally:
        pynvml.nvmlShutdown()
    return facts

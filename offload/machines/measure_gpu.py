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

from .machine import Copies

_BYTES = 256 << 20
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
    return copies_of(CudaCopier(device, _BYTES), _BYTES)


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


class CudaCopier:
    """Copies on separate streams of a CUDA device, so that both directions run
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
        self._streams = {
            way: torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
            for way in ways
        }
        self._peer = self._peer_tensor(nbytes)

    @property
    def has_peer(self) -> bool:
        return self._peer is not None

    def copy(self, way: str, *, pinned: bool) -> None:
        """Starts a copy of uint8 tensors; see `CopyStarter.copy`."""
        there, here = self._there, self._here[pinned]
        with torch.cuda.stream(self._streams[way]):
            if way == "in":
                there[0].copy_(here[0], non_blocking=True)
            elif way == "out":
                here[1].copy_(there[1], non_blocking=True)
            else:
                assert self._peer is not None, "call it only if `has_peer`"
                there[0].copy_(self._peer, non_blocking=True)

    def wait(self) -> None:
        torch.cuda.synchronize(self._device)

    def _peer_tensor(self, nbytes: int) -> torch.Tensor | None:
        own = self._device.index or 0
        others = [i for i in range(torch.cuda.device_count()) if i != own]
        for other in others:
            if torch.cuda.can_device_access_peer(own, other):
                return torch.empty(nbytes, dtype=torch.uint8, device=f"cuda:{other}")
        return None


def gpu_facts(device: str) -> dict[str, Any]:
    """The name, memory (bytes) and number of GPUs. NVIDIA's management library tells
    them if it is installed, else torch."""
    index = torch.device(device).index or 0
    facts: dict[str, Any] = {"device": "cuda"}
    try:
        import pynvml

        pynvml.nvmlInit()
    except Exception:  # not installed, or no driver: torch knows as much
        found = torch.cuda.get_device_properties(index)
        facts |= {"name": found.name, "device_memory": int(found.total_memory)}
        facts["num_devices"] = torch.cuda.device_count()
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

"""`torch.simgpu`: what `torch.get_device_module` gives for the simulated GPU.

It has the names of `torch.cuda` that other accelerators of torch have, too.
"""

from __future__ import annotations

import contextlib
import types
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

NAME = "simgpu"
NUM_DEVICES = 2
_Device = torch.device | str | int | None
_ops: Any = torch.ops.simgpu


@dataclass(frozen=True)
class Properties:
    """What `get_device_properties` gives: of CUDA's, those that say something here."""

    name: str
    total_memory: int
    """Bytes."""


class _Runtime:
    """Stands for `torch.cuda.cudart()`: host memory is pinned by its address."""

    def cudaHostRegister(self, address: int, num_bytes: int, flags: int = 0) -> int:
        return int(_ops.register_host(address, num_bytes))

    def cudaHostUnregister(self, address: int) -> int:
        return int(_ops.unregister_host(address))


def cudart() -> _Runtime:
    return _Runtime()


def _index(device: _Device) -> int:
    if isinstance(device, int):
        return device
    given = torch.device(NAME if device is None else device)
    if given.type != NAME:
        raise ValueError(f"Expected a {NAME} device, but got: {given}")
    return current_device() if given.index is None else given.index


class device:
    """Makes a device the current one, in a `with` statement."""

    def __init__(self, device: _Device) -> None:
        self._index = _index(device)
        self._before = 0

    def __enter__(self) -> None:
        self._before = current_device()
        set_device(self._index)

    def __exit__(self, *error: object) -> None:
        set_device(self._before)


class Stream(torch.Stream):
    """A stream of the current device, or of the one given."""

    def __new__(cls, device: _Device = None, priority: int = 0) -> Any:
        return super().__new__(
            cls, torch.device(NAME, _index(device)), priority=priority
        )


class Event(torch.Event):
    """An event of the simulated GPU."""

    def __new__(
        cls,
        enable_timing: bool = False,
        blocking: bool = False,
        interprocess: bool = False,
    ) -> Any:
        options = {"blocking": blocking, "interprocess": interprocess}
        return super().__new__(
            cls, torch.device(NAME), enable_timing=enable_timing, **options
        )


def is_available() -> bool:
    return True


def is_initialized() -> bool:
    return True


def init() -> None:
    pass


_lazy_init = init


def _is_in_bad_fork() -> bool:
    return bool(_ops.is_forked())


def device_count() -> int:
    return NUM_DEVICES


def current_device() -> int:
    return torch.accelerator.current_device_index()


def set_device(device: _Device) -> None:
    torch.accelerator.set_device_index(_index(device))


def synchronize(device: _Device = None) -> None:
    torch.accelerator.synchronize(_index(device))


def current_stream(device: _Device = None) -> torch.Stream:
    return torch.accelerator.current_stream(_index(device))


def default_stream(device: _Device = None) -> torch.Stream:
    kind = torch._C._autograd.DeviceType.PrivateUse1.value
    return torch.Stream(stream_id=0, device_index=_index(device), device_type=kind)


def set_stream(stream: torch.Stream) -> None:
    torch.accelerator.set_stream(stream)


@contextlib.contextmanager
def stream(stream: torch.Stream | None) -> Iterator[None]:
    """Makes a stream, and its device, the current ones of this thread."""
    with contextlib.nullcontext() if stream is None else stream:
        yield


def get_device_name(device: _Device = None) -> str:
    return get_device_properties(device).name


def get_device_properties(device: _Device = None) -> Properties:
    return Properties("Simulated GPU", mem_get_info(device)[1])


def can_device_access_peer(device: _Device, peer_device: _Device) -> bool:
    return _index(device) != _index(peer_device)


def mem_get_info(device: _Device = None) -> tuple[int, int]:
    """Bytes that are free, and bytes in all."""
    free, total = torch.accelerator.get_memory_info(_index(device))
    return free, total


def memory_stats(device: _Device = None) -> dict[str, Any]:
    return torch.accelerator.memory_stats(_index(device))


def memory_allocated(device: _Device = None) -> int:
    return torch.accelerator.memory_allocated(_index(device))


def max_memory_allocated(device: _Device = None) -> int:
    return torch.accelerator.max_memory_allocated(_index(device))


def memory_reserved(device: _Device = None) -> int:
    return torch.accelerator.memory_reserved(_index(device))


def max_memory_reserved(device: _Device = None) -> int:
    return torch.accelerator.max_memory_reserved(_index(device))


def reset_peak_memory_stats(device: _Device = None) -> None:
    torch.accelerator.reset_peak_memory_stats(_index(device))


def empty_cache() -> None:
    torch.accelerator.empty_cache()


def _generator(device: _Device) -> torch.Generator:
    found: torch.Generator = _ops.default_generator(_index(device))
    return found


def get_rng_state(device: _Device = NAME) -> torch.Tensor:
    return _generator(device).get_state()


def set_rng_state(new_state: torch.Tensor, device: _Device = NAME) -> None:
    _generator(device).set_state(new_state)


def manual_seed(seed: int) -> None:
    _generator(None).manual_seed(seed)


def manual_seed_all(seed: int) -> None:
    for index in range(NUM_DEVICES):
        _generator(index).manual_seed(seed)


def initial_seed() -> int:
    return _generator(None).initial_seed()


def get_amp_supported_dtype() -> list[torch.dtype]:
    return [torch.float16, torch.bfloat16]


def as_module() -> types.ModuleType:
    """`torch.simgpu`: all that is above, and a generator for each device."""
    module = types.ModuleType(f"torch.{NAME}", __doc__)
    for name, value in globals().items():
        if not name.startswith("__"):
            setattr(module, name, value)
    module.default_generators = tuple(  # type: ignore[attr-defined]
        _generator(index) for index in range(NUM_DEVICES)
    )
    return module

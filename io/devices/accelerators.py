"""The accelerators that torch finds in this machine: CUDA, ROCm, XPU, or another one
that has registered itself with torch.

A name is that of a torch device: `cuda`, `cuda:1`. Without a number it is the current
device of that kind.
"""

from typing import Any

import torch


def accelerators() -> tuple[str, ...]:
    """The names of all accelerators that can be used, in torch's order."""
    kind = torch.accelerator.current_accelerator(check_available=True)
    if kind is None:
        return ()
    return tuple(f"{kind.type}:{i}" for i in range(torch.accelerator.device_count()))


def is_accelerator(name: str) -> bool:
    """Whether this machine has an accelerator called `name`."""
    try:
        device = torch.device(name)
    except RuntimeError:
        return False
    return f"{device.type}:{device.index or 0}" in accelerators()


def memory_of(name: str) -> tuple[int, int]:
    """The bytes of memory of the accelerator `name` that are free, and all of them."""
    torch.accelerator.current_device_index()  # initialises the runtime
    free, total = torch.accelerator.get_memory_info(torch.device(name))
    return int(free), int(total)


def allocated_bytes(name: str) -> int:
    """The bytes that tensors of this process take on the accelerator `name`."""
    return int(torch.accelerator.memory_allocated(torch.device(name)))


def title_of(name: str) -> str:
    """What the maker calls the accelerator `name`; the name itself if torch does not
    tell."""
    tell = getattr(module_of(name), "get_device_name", None)
    return str(tell(torch.device(name).index or 0)) if tell is not None else name


def reaches(name: str, other: str) -> bool:
    """Whether `name` copies from the memory of the accelerator `other` directly.

    False if torch cannot tell for accelerators of this kind.
    """
    one, two = torch.device(name), torch.device(other)
    ask = getattr(module_of(name), "can_device_access_peer", None)
    if ask is None or one.type != two.type:
        return False
    return bool(ask(one.index or 0, two.index or 0))


def module_of(name: str) -> Any:
    """torch's module for accelerators of this kind, such as `torch.cuda`.

    What other kinds have not is looked up in it: it may be missing.
    """
    return torch.get_device_module(torch.device(name))

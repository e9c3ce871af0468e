"""How many bytes a suspended micro-batch keeps alive: its hidden states, masks, caches.

Found by walking the frames of its stack, so it is the same on every device and on
every run; temporaries inside a running kernel are not in it.
"""

from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from functools import partial
from types import FrameType, FunctionType, ModuleType
from typing import Any

import torch

_MAX_DEPTH = 12
_MAX_ITEMS = 4096
_MAX_OBJECTS = 50_000


def held_bytes(frame: FrameType | None, work: "partial[Any]") -> int:
    """Bytes of the distinct storages reachable from the locals of `frame` and of its
    callers, which run `work`, a function and its batch.

    Not counted is what is nobody's alone: parameters (they belong to the working set),
    what a function closes over, and the object whose method `work` is. Of the batch
    only its own elements count: views of a data set do not hold it each.
    """
    sizes: dict[int, int] = {}
    views: dict[int, int] = {}
    seen = {id(getattr(work.func, "__self__", None))}
    for tensor in _tensors(work.args, set(seen), _MAX_DEPTH):
        address = tensor.untyped_storage().data_ptr()
        views[address] = views.get(address, 0) + tensor.numel() * tensor.itemsize
        sizes[address] = min(views[address], tensor.untyped_storage().nbytes())
    while frame is not None:
        shared = frame.f_code.co_freevars
        for name, value in list(frame.f_locals.items()):
            if name in shared:
                continue
            for tensor in _tensors(value, seen, _MAX_DEPTH):
                storage = tensor.untyped_storage()
                sizes.setdefault(storage.data_ptr(), storage.nbytes())
        frame = frame.f_back
    return sum(sizes.values())


def _tensors(value: Any, seen: set[int], depth: int) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        if type(value) is torch.Tensor and _has_memory(value):
            yield value
        return
    if depth == 0 or id(value) in seen or len(seen) > _MAX_OBJECTS:
        return
    if isinstance(value, (dict, list, tuple, set)):
        if len(value) <= _MAX_ITEMS:
            seen.add(id(value))
            for item in value.values() if isinstance(value, dict) else value:
                yield from _tensors(item, seen, depth - 1)
    elif is_dataclass(value) and not isinstance(value, type):
        seen.add(id(value))
        for item in fields(value):
            yield from _tensors(getattr(value, item.name, None), seen, depth - 1)
    elif _is_plain_object(value):
        seen.add(id(value))
        yield from _tensors(vars(value), seen, depth - 1)


def _has_memory(tensor: torch.Tensor) -> bool:
    return tensor.device.type != "meta" and tensor.layout is torch.strided


def _is_plain_object(value: Any) -> bool:
    """Objects whose attributes may be what the model keeps, such as a KV cache: not
    modules, nor what torch and this library are made of (other micro-batches)."""
    if isinstance(value, (torch.nn.Module, type, ModuleType, FunctionType)):
        return False
    package = type(value).__module__.partition(".")[0]
    return package not in ("penstock", "torch") and hasattr(value, "__dict__")

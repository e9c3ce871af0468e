"""How many bytes a suspended micro-batch keeps alive: its hidden states, masks, caches.

The frames of its stack are searched for tensors, so the result is the same on every
device and in every run. Temporaries inside a running kernel are not counted.
"""

import sys
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from functools import partial
from inspect import CO_OPTIMIZED
from types import FrameType, FunctionType, ModuleType
from typing import Any

import torch

_MAX_DEPTH = 12
_MAX_ITEMS = 4096
_MAX_OBJECTS = 50_000
_ATOMS = frozenset({int, str, float, bool, bytes, type(None)})
"""Types that contain nothing. Most objects met are of these, above all token ids."""
_REFERENCES_TO_A_COPY = 3  # the frame, `values_of`, and the call that counts


def held_bytes(frame: FrameType | None, work: "partial[Any]") -> int:
    """Bytes of the distinct storages reachable from the locals of `frame` and of its
    callers, which run `work`, a function and its batch.

    Shared objects are not counted: parameters (they belong to the working set), the
    variables that a function closes over, and the object whose method `work` is. Of
    the batch only its own elements count: it may consist of views of a whole data set.
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
        for name, value in values_of(frame):
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
    parts = parts_of(value)
    if parts is not None:
        seen.add(id(value))
        for _, part in parts:
            if type(part) not in _ATOMS:
                yield from _tensors(part, seen, depth - 1)


def values_of(frame: FrameType) -> list[tuple[str, Any]]:
    """The local variables of `frame`, by their names."""
    values = frame.f_locals
    items = list(values.items())
    # Before Python 3.13 the frame keeps this dictionary, and its old values, until
    # `f_locals` is read again. So it is emptied, unless user code refers to it, too.
    is_a_copy = frame.f_code.co_flags & CO_OPTIMIZED and type(values) is dict
    if is_a_copy and sys.getrefcount(values) <= _REFERENCES_TO_A_COPY:
        values.clear()
    return items


def parts_of(value: Any) -> list[tuple[str | None, Any]] | None:
    """The parts of `value`, each with its name in `value` or None. Returns None if
    `value` is no container, or too long to search."""
    if isinstance(value, dict):
        if len(value) > _MAX_ITEMS:
            return None
        return [(k if type(k) is str else None, item) for k, item in value.items()]
    if isinstance(value, (list, tuple, set)):
        return [(None, item) for item in value] if len(value) <= _MAX_ITEMS else None
    if is_dataclass(value) and not isinstance(value, type):
        return [(f.name, getattr(value, f.name, None)) for f in fields(value)]
    if _is_plain_object(value):
        return [(None, vars(value))]
    return None


def _has_memory(tensor: torch.Tensor) -> bool:
    return tensor.device.type != "meta" and tensor.layout is torch.strided


def _is_plain_object(value: Any) -> bool:
    """Whether the attributes of `value` may be a micro-batch's own, as in a KV cache.
    They are not in modules, nor in objects of torch or of this library."""
    if isinstance(value, (torch.nn.Module, type, ModuleType, FunctionType)):
        return False
    package = type(value).__module__.partition(".")[0]
    return package not in ("penstock", "torch") and hasattr(value, "__dict__")

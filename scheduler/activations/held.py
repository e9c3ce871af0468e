"""How many bytes a suspended micro-batch keeps alive: its hidden states, masks, caches.

Found by walking the frames of its stack, so it is the same on every device and on
every run; temporaries inside a running kernel are not in it.
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
"""Most of what is met, ids above all: nothing is in them."""
_REFERENCES_TO_A_COPY = 3  # the frame, `values_of`, and the call that counts


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
    found = list(values.items())
    # Before Python 3.13 the frame keeps this dictionary, and with it, until somebody
    # asks again, what its variables have long let go. Unless it is the user's, too.
    is_a_copy = frame.f_code.co_flags & CO_OPTIMIZED and type(values) is dict
    if is_a_copy and sys.getrefcount(values) <= _REFERENCES_TO_A_COPY:
        values.clear()
    return found


def parts_of(value: Any) -> list[tuple[str | None, Any]] | None:
    """What `value` consists of, with the names that it has for it; None if it is no
    container, or one too long to search."""
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
    """Objects whose attributes may be what the model keeps, such as a KV cache: not
    modules, nor what torch and this library are made of (other micro-batches)."""
    if isinstance(value, (torch.nn.Module, type, ModuleType, FunctionType)):
        return False
    package = type(value).__module__.partition(".")[0]
    return package not in ("penstock", "torch") and hasattr(value, "__dict__")

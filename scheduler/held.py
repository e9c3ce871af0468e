"""How many bytes a suspended micro-batch keeps alive: its hidden states, masks, caches.

Found by walking the frames of its stack, so it is the same on every device and on
every run; temporaries inside a running kernel are not in it.
"""

from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from types import FrameType
from typing import Any

import torch

_MAX_DEPTH = 6
_MAX_ITEMS = 4096


def held_bytes(frame: FrameType | None) -> int:
    """Bytes of the distinct storages reachable from the locals of `frame` and of its
    callers. Parameters are nobody's: they belong to the working set."""
    sizes: dict[int, int] = {}
    seen: set[int] = set()
    while frame is not None:
        for value in list(frame.f_locals.values()):
            for tensor in _tensors(value, seen, _MAX_DEPTH):
                if type(tensor) is not torch.Tensor or tensor.device.type == "meta":
                    continue
                storage = tensor.untyped_storage()
                sizes[storage.data_ptr()] = storage.nbytes()
        frame = frame.f_back
    return sum(sizes.values())


def _tensors(value: Any, seen: set[int], depth: int) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
        return
    if depth == 0 or id(value) in seen or isinstance(value, torch.nn.Module):
        return
    if isinstance(value, (dict, list, tuple, set)) and len(value) <= _MAX_ITEMS:
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


def _is_plain_object(value: Any) -> bool:
    """Objects whose attributes may be what the model keeps, such as a KV cache."""
    module = type(value).__module__.split(".")[0]
    return module in ("transformers", "__main__") and hasattr(value, "__dict__")

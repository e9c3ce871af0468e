"""Runs a model whose weights are on meta: what cannot run there is moved, stands for
itself, or is noted."""

from collections.abc import Mapping
from typing import Any, Protocol

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map

from .cache_contents import tensors_in

_VALUES = {"item": 1, "__bool__": True, "__int__": 1, "__float__": 1.0}
"""What stands for the value of a tensor on meta, by the method that asks for it."""
_MOST_VALUES = 1000


class Observer(Protocol):
    """Is told of attention and products."""

    def attend(self, query: Any, key: Any, value: Any) -> Any:
        """Called instead of attention; returns its result."""
        ...

    def multiply(self, rows: int, weight: Any) -> None:
        """Called before a product of `rows` rows with `weight`."""
        ...


class OnMeta(TorchFunctionMode):
    """Moves what meets tensors on meta there, too; tells `observer` of attention and
    products. Values of tensors on meta are one, such as those of masks that hide
    nothing; a loop that would not end so raises RuntimeError."""

    def __init__(self, observer: Observer) -> None:
        super().__init__()
        self._observer = observer
        self._num_values = 0

    def __torch_function__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        given = dict(kwargs or {})
        name = getattr(func, "__name__", "")
        if name == "__get__":
            return func(*args, **given)
        if name in _VALUES and args[0].device.type == "meta":
            return self._value(name)
        if name == "scaled_dot_product_attention":
            named = {k: given[k] for k in ("query", "key", "value") if k in given}
            return self._observer.attend(*args[:3], **named)
        if name == "linear" and len(args) > 1:
            self._observer.multiply(args[0].shape[:-1].numel(), args[1])
        kinds = {t.device.type for t in tensors_in((args, given))}
        if "meta" in kinds and len(kinds) > 1:
            args, given = tree_map(_to_meta, (args, given))
        return func(*args, **given)

    def _value(self, kind: str) -> Any:
        self._num_values += 1
        if self._num_values > _MOST_VALUES:
            raise RuntimeError("it depends on the values of many tensors")
        return _VALUES[kind]


def _to_meta(value: Any) -> Any:
    if isinstance(value, torch.Tensor) and value.device.type != "meta":
        return torch.empty_like(value, device="meta")
    return value

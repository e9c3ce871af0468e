"""Tensors of an accelerator whose values the host knows, so that a question about them
makes nobody wait."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Self

import torch
from torch.overrides import TorchFunctionMode

from .queued_copy import queued_to

_DisableSubclass = torch._C.DisableTorchFunctionSubclass
_COMPARED = ("eq", "ne", "lt", "le", "gt", "ge")
_CASTS = ("to", "type", "long", "int", "bool", "float", "clone", "contiguous", "detach")
_FORMS = (
    "__getitem__",
    "expand",
    "unsqueeze",
    "squeeze",
    "view",
    "reshape",
    "cat",
    "pad",
)
_NUMBERS = ("__bool__", "__int__", "__index__", "__float__", "item")
_ANSWERS = frozenset([*_NUMBERS, "tolist", "cpu", "numpy"])
"""Functions that need values on the host."""
_KEPT = frozenset(
    [
        *_COMPARED,
        *(f"__{name}__" for name in _COMPARED),
        *_CASTS,
        *_FORMS,
        *("pad", "repeat_interleave", "__invert__", "bitwise_not", "logical_not"),
        *("all", "any", "sum", "max", "min", "amax", "amin", "isin"),
        *("new_ones", "new_zeros", "ones_like", "zeros_like"),
    ]
)
"""Functions whose results are known where all tensors that they take are."""


class Known(torch.Tensor):
    """A tensor on an accelerator with the same values on the CPU, in `host`.

    Functions give what they give for the tensor on the accelerator. Those that need
    values on the host (`bool`, `item`) take them from `host` and do not wait. What a
    few functions make of known tensors alone is known, too. Whoever writes to one in
    place makes it an unknown one.
    """

    host: torch.Tensor | None

    @classmethod
    def of(cls, tensor: torch.Tensor, host: torch.Tensor) -> Self:
        found = tensor.as_subclass(cls)
        found.host = host
        return found

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        with _DisableSubclass():
            if name in _ANSWERS or _leaves(name, args, kwargs):
                if _all_known((args, kwargs)):
                    return func(*_hosts(args), **_hosts(kwargs))
                return func(*args, **kwargs)
            if name in _KEPT and "out" not in kwargs and _all_known((args, kwargs)):
                found = func(*args, **kwargs)
                if isinstance(found, torch.Tensor):
                    own = func(*_here(args, name), **_here(kwargs, name))
                    return cls.of(found.as_subclass(torch.Tensor), own)
                return found
            found = func(*args, **kwargs)
        if name == "__setitem__" or (name.endswith("_") and name[:2] != "__"):
            for tensor in _tensors(args[:1]):
                if isinstance(tensor, Known):
                    tensor.host = None
        return found


class _KnownFactory(TorchFunctionMode):
    """Makes known tensors of `torch.tensor` for an accelerator."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func is torch.tensor and _is_elsewhere(kwargs.get("device")):
            device = kwargs.pop("device")
            return known_to(func(*args, device="cpu", **kwargs), device)
        return func(*args, **kwargs)


def knowing_constants() -> TorchFunctionMode:
    """In this `with` block, what `torch.tensor` makes for an accelerator is known, and
    nobody waits for its copy."""
    return _KnownFactory()


def known_to(tensor: torch.Tensor, device: str | torch.device) -> torch.Tensor:
    """`tensor`, which is on the CPU, on `device`, known to the host. Its copy is queued
    as by `queued_to`. Nobody may change `tensor` afterwards. On the CPU: `tensor`
    itself."""
    there = queued_to(tensor, device)
    return there if there is tensor else Known.of(there, tensor)


def rows_of(tensor: torch.Tensor, rows: Sequence[int]) -> torch.Tensor:
    """The rows of `tensor` with these indices; known where `tensor` is."""
    index = torch.tensor(rows, device="cpu")
    if isinstance(tensor, Known) and tensor.host is not None:
        return known_to(tensor.host.index_select(0, index), tensor.device)
    return tensor.index_select(0, queued_to(index, tensor.device))


def _is_elsewhere(device: Any) -> bool:
    return device is not None and torch.device(device).type != "cpu"


def _leaves(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether `.to(...)` asks for a tensor on the CPU."""
    named = [kwargs.get("device"), *args[1:]] if name == "to" else []
    return any(
        isinstance(value, str | torch.device) and torch.device(value).type == "cpu"
        for value in named
    )


def _tensors(values: Any) -> Iterator[torch.Tensor]:
    if isinstance(values, torch.Tensor):
        yield values
    elif isinstance(values, tuple | list):
        for value in values:
            yield from _tensors(value)
    elif isinstance(values, dict):
        yield from _tensors(list(values.values()))


def _all_known(values: Any) -> bool:
    return all(
        isinstance(tensor, Known) and tensor.host is not None
        for tensor in _tensors(values)
    )


def _hosts(values: Any) -> Any:
    """`values` with known tensors replaced by those on the CPU."""
    return _replaced(values, lambda value: value)


def _here(values: Any, function: str) -> Any:
    """The arguments of `function` for a call on the CPU."""

    def here(value: Any) -> Any:
        is_device = isinstance(value, torch.device)
        if is_device or (function == "to" and isinstance(value, str)):
            return torch.device("cpu")
        return value

    return _replaced(values, here)


def _replaced(values: Any, others: Callable[[Any], Any]) -> Any:
    if isinstance(values, Known):
        return values.host
    if type(values) in (tuple, list):
        return type(values)(_replaced(value, others) for value in values)
    if isinstance(values, dict):
        return {name: _replaced(value, others) for name, value in values.items()}
    return others(values)

"""Looks up and checks the weights that `penstock.update` is to change, before it
changes any."""

import difflib
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import nn

from ...io.errors import UsageError


@dataclass(frozen=True, slots=True)
class NewValue:
    """A tensor of the model, and its new value."""

    name: str
    """The name that the caller used."""
    streamed_name: str | None
    """The name of the streamed tensor; None if the tensor is not streamed."""
    standing: torch.Tensor
    """The present tensor; may be a placeholder."""
    value: torch.Tensor


def new_values(
    model: nn.Module,
    tensors: Mapping[str, torch.Tensor],
    streamed_name: Callable[[nn.Module, str], str | None],
    like: Callable[[str], tuple[tuple[int, ...], torch.dtype]],
) -> list[NewValue]:
    """The new values of `tensors`, which are given by name in `model`; each tensor
    once.

    `streamed_name(module, key)` is the name of a streamed tensor, or None.
    `like(streamed name)` is its shape and dtype. Raises UsageError if a name, shape or
    dtype does not fit.
    """
    if not isinstance(tensors, Mapping):
        raise UsageError(
            f"a {type(tensors).__name__} does not say which weights to change: give a "
            "dict of tensors by name"
        )
    found: dict[object, NewValue] = {}
    for name, value in tensors.items():
        module, key, standing = _look_up(model, name)
        streamed = streamed_name(module, key)
        if not isinstance(value, torch.Tensor):
            raise UsageError(f"{name!r}: {type(value).__name__} is not a tensor")
        expected = (tuple(standing.shape), standing.dtype)
        shape, dtype = like(streamed) if streamed is not None else expected
        _check(name, value, shape, dtype)
        which = streamed if streamed is not None else id(standing)
        before = found.get(which)
        if before is not None and not torch.equal(before.value, value):
            raise UsageError(
                f"{before.name!r} and {name!r} are one tied weight: give one of them"
            )
        found[which] = NewValue(name, streamed, standing, value.detach())
    return list(found.values())


def _look_up(model: nn.Module, name: str) -> tuple[nn.Module, str, torch.Tensor]:
    name = str(name)
    owner, _, key = name.rpartition(".")
    try:
        module = model.get_submodule(owner)
        tensor = module._parameters.get(key, module._buffers.get(key))
    except AttributeError:
        tensor = None
    if tensor is not None:
        return module, key, tensor
    known = [n for n, _ in model.named_parameters(remove_duplicate=False)]
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    raise UsageError(
        f"the model has no weight {name!r}; it has {len(known)}, "
        f"such as {', '.join(map(repr, near or known[:3]))}"
    )


def _check(
    name: str, value: torch.Tensor, shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    if value.is_nested or value.layout is not torch.strided or _is_fake(value):
        kind = value.layout if type(value) is torch.Tensor else type(value).__name__
        raise UsageError(
            f"the new {name!r} is not a plain tensor ({kind}): give a dense one with "
            "values (such as tensor.to_dense())"
        )
    if tuple(value.shape) != shape:
        raise UsageError(
            f"{name!r} has shape {list(shape)}, the new one {list(value.shape)}: give "
            "one of the same shape"
        )
    if value.device.type == "meta":
        raise UsageError(f"the new {name!r} is on meta: it has no values")
    is_like = value.dtype.is_floating_point == dtype.is_floating_point
    is_small = value.dtype.is_floating_point and value.dtype.itemsize < 2
    if value.dtype != dtype and (is_small or not is_like):
        raise UsageError(
            f"{name!r} has dtype {dtype}, the new one {value.dtype}: cast it first"
        )


def _is_fake(value: torch.Tensor) -> bool:
    """Whether `value` has a shape but no values."""
    return isinstance(value, torch._subclasses.FakeTensor)

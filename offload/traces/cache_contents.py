"""Reads what the caches of transformers hold: keys and values, and states."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True, slots=True)
class Kept:
    """What one module keeps of each sequence, and how it attends."""

    per_token: int = 0
    """Elements of keys and values of one token in a layer of the cache that tiers can
    keep."""
    own_per_token: int = 0
    """Elements of one token in a layer of another kind."""
    cross_per_token: int = 0
    """Elements of keys and values of one token of the encoder."""
    window: int | None = None
    """One more than the tokens that are kept; None: all of them."""
    state_bytes: int = 0
    """Bytes that a sequence takes whatever its length."""
    width: int = 0
    """The heads times the mean of the sizes of a key and a value; 0 if not seen."""
    expanded_per_token: int = 0
    """Elements of temporary keys and values for one kept token in each call: those that
    are made of latents, or repeated for several heads."""
    expanded_flops: float = 0.0
    """FLOPs in which they are made, for one kept token."""


def kind_of(key: tuple[str, int], layer: Any) -> tuple[str, type, int | None]:
    """The part of the cache that a layer is in, its class, and its window."""
    return key[0], type(layer), getattr(layer, "sliding_window", None)


def kept_in(
    key: tuple[str, int],
    layer: Any,
    before: Mapping[str, tuple[int, int]],
    before_tokens: int,
) -> Kept:
    """What a layer of the cache keeps; `before` are the sizes of its tensors before one
    more token came to `before_tokens`."""
    from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

    part, _ = key
    window = getattr(layer, "sliding_window", None)
    is_tiered = type(layer) in (DynamicLayer, DynamicSlidingWindowLayer)
    per_token = states = 0
    for name, (elements, nbytes) in sizes_of(layer).items():
        tensor_tokens = before_tokens + (part != "cross")
        had = before.get(name, (0, 0))[0]
        if name in ("keys", "values"):
            kept = tensor_tokens if window is None else min(tensor_tokens, window - 1)
            per_token += elements // max(1, kept)
        elif elements > had:
            per_token += elements - had
        else:
            states += nbytes
    if part == "cross":
        return Kept(cross_per_token=per_token, state_bytes=states)
    if is_tiered:
        return Kept(per_token=per_token, window=window, state_bytes=states)
    return Kept(own_per_token=per_token, window=window, state_bytes=states)


def together(parts: list[Kept]) -> Kept:
    return Kept(
        per_token=sum(part.per_token for part in parts),
        own_per_token=sum(part.own_per_token for part in parts),
        cross_per_token=sum(part.cross_per_token for part in parts),
        window=next((part.window for part in parts if part.window), None),
        state_bytes=sum(part.state_bytes for part in parts),
    )


def sizes_of(layer: Any) -> dict[str, tuple[int, int]]:
    """(elements, bytes) of the tensors of a layer, by the names of its attributes."""
    return {
        name: (
            sum(t.numel() for t in tensors),
            sum(map(nbytes_of, tensors)),
        )
        for name, value in vars(layer).items()
        if (tensors := [t for t in tensors_in(value) if t.is_floating_point()])
    }


def nbytes_of(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def tensors_in(values: Any) -> Iterator[torch.Tensor]:
    """All tensors in `values`, at any depth of dicts, lists and tuples."""
    if isinstance(values, torch.Tensor):
        yield values
    elif isinstance(values, Mapping):
        for value in values.values():
            yield from tensors_in(value)
    elif isinstance(values, list | tuple):
        for value in values:
            yield from tensors_in(value)


def storage_of(tensor: torch.Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


def loose_in(name: str, value: Any, cache_class: type) -> list[torch.Tensor]:
    """The tensors of a cache that is not of transformers' class."""
    if isinstance(value, cache_class):
        return []
    found = [*tensors_in(value)] or [*tensors_in(getattr(value, "__dict__", None))]
    return [tensor for tensor in found if tensor.is_floating_point()]

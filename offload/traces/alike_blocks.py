"""Finds the blocks of a model that are alike, so that one of them is traced for all."""

from collections.abc import Iterator
from typing import Any

from torch import nn

_NUMBERS = ("layer_idx", "layer_id", "block_idx", "layer_index", "layer_number")
"""Attributes that number the blocks, and say nothing else."""
_PLAIN = (bool, int, float, str, type(None))


def alike_blocks(model: nn.Module) -> dict[str, str]:
    """For each block that is like an earlier one of its list: its name, and the name of
    the first such block.

    Two blocks are alike if their modules have the same classes, plain attributes, and
    shapes and dtypes of parameters; numbers of layers may differ.
    """
    found: dict[str, str] = {}
    for prefix, blocks in _stacks("", model):
        first: dict[Any, str] = {}
        for key, block in blocks.named_children():
            name = f"{prefix}.{key}"
            known = first.setdefault(_signature(block), name)
            if known != name:
                found[name] = known
    return found


def _stacks(name: str, module: nn.Module) -> Iterator[tuple[str, nn.ModuleList]]:
    """The outermost lists of blocks, with their names."""
    for key, child in module.named_children():
        full_name = f"{name}.{key}" if name else key
        if isinstance(child, nn.ModuleList):
            yield full_name, child
        else:
            yield from _stacks(full_name, child)


def _signature(module: nn.Module) -> Any:
    plain = tuple(
        (key, _plain(value))
        for key, value in sorted(vars(module).items())
        if key not in _NUMBERS
    )
    tensors = tuple(
        (key, None if p is None else (tuple(p.shape), p.dtype))
        for key, p in module._parameters.items()
    )
    children = tuple((key, _signature(child)) for key, child in module.named_children())
    return type(module), plain, tensors, children


def _plain(value: Any) -> Any:
    """`value` where it may tell blocks apart; a config by its identity."""
    if isinstance(value, _PLAIN):
        return value
    if isinstance(value, list | tuple) and all(isinstance(v, _PLAIN) for v in value):
        return tuple(value)
    return id(value) if hasattr(value, "model_type") else None

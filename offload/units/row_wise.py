"""Finds the row-wise modules in sites, which may run once for several micro-batches."""

import sys
from collections.abc import Hashable
from typing import Any

import torch
from torch import nn

from ...scheduler.sweep.coalescing import RowWise
from .experts import is_experts
from .row_probe import takes_rows_to_rows
from .sites import ModelDivision

_OF_TORCH = ("_parameters", "_buffers", "_modules")
"""Attributes of all modules, which are compared by what is in them."""
_PLAIN = (bool, int, float, str, torch.dtype)


def find_row_wise(found: ModelDivision) -> tuple[RowWise, ...]:
    """The row-wise modules, in definition order.

    They are `nn.Linear`, transformers' `Conv1D`, and stacked experts, but no subclasses
    of them, which may do something else. Modules that consist of these and of pointwise
    operations are included, such as a whole MLP.
    """
    modules: dict[nn.Module, None] = {}
    for site in found.sites:
        modules.update(dict.fromkeys(site.module.modules()))
    sites = {site.module for site in found.sites}
    known: dict[Hashable, bool] = {}
    row_wise = (_row_wise(module, sites, known) for module in modules)
    return tuple(filter(None, row_wise))


def _row_wise(
    module: nn.Module, sites: set[nn.Module], known: dict[Hashable, bool]
) -> RowWise | None:
    """`module` as a row-wise one; None if it is not. What is `known` of modules is not
    found out again for those that are alike."""
    num_args = _num_args(module)
    if num_args is not None:
        return RowWise(module, num_args)
    _, *parts = module.modules()
    # No micro-batch may wait for a site inside of a shared module.
    if not parts or not sites.isdisjoint((module, *parts)):
        return None
    kind = _kind(module)
    if kind not in known:
        known[kind] = takes_rows_to_rows(module)
    return RowWise(module, 1, tuple(parts)) if known[kind] else None


def _kind(module: nn.Module) -> Hashable:
    """All that the forward of `module` may see, but for the values of its tensors."""
    return tuple(
        (
            name,
            type(part),
            tuple((k, _told(v)) for k, v in vars(part).items() if k not in _OF_TORCH),
            tuple(
                (key, None if tensor is None else (tensor.shape, tensor.dtype))
                for key, tensor in (*part._parameters.items(), *part._buffers.items())
            ),
        )
        for name, part in module.named_modules()
    )


def _told(value: Any) -> Hashable:
    """What tells an attribute from others: its value, if that is plain, or who it
    is."""
    if value is None or isinstance(value, _PLAIN):
        return type(value), value
    is_empty = isinstance(value, dict | list | set | tuple) and not value
    return str(type(value)) if is_empty else id(value)


def _num_args(module: nn.Module) -> int | None:
    if type(module) is nn.Linear or type(module) is _conv1d():
        return 1
    return 3 if is_experts(module) else None


def _conv1d() -> type | None:
    """transformers' Conv1D; None if transformers is not imported, which takes
    seconds."""
    module = sys.modules.get("transformers.pytorch_utils")
    found: type | None = getattr(module, "Conv1D", None)
    return found

"""Finds the row-wise modules inside of sites: what may run for many at once."""

import sys

from torch import nn

from ..scheduler.coalescing import RowWise
from .sites import Found

# What transformers' `use_experts_implementation` (>= 5.17, < 6) puts on a module. Its
# forward takes tokens, and for each the chosen experts and their weights.
_OF_EXPERTS = frozenset({"config", "has_gate", "has_bias", "is_transposed"})


def find_row_wise(found: Found) -> list[RowWise]:
    """`nn.Linear`, transformers' `Conv1D` and stacked experts, in definition order.
    Exactly these: what a subclass does with rows is its own affair."""
    modules: dict[nn.Module, None] = {}
    for site in found.sites:
        modules.update(dict.fromkeys(site.module.modules()))
    return [
        RowWise(module, num_args)
        for module in modules
        if (num_args := _num_args(module)) is not None
    ]


def _num_args(module: nn.Module) -> int | None:
    if type(module) is nn.Linear or type(module) is _conv1d():
        return 1
    is_experts = (
        hasattr(type(module), "_apply_gate") and set(vars(module)) >= _OF_EXPERTS
    )
    return 3 if is_experts else None


def _conv1d() -> type | None:
    """Without importing transformers, which takes seconds."""
    module = sys.modules.get("transformers.pytorch_utils")
    found: type | None = getattr(module, "Conv1D", None)
    return found

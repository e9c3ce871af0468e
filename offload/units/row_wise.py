"""Finds the row-wise modules inside of sites: what may run for many at once."""

import sys

from torch import nn

from ...scheduler.sweep.coalescing import RowWise
from .row_probe import takes_rows_to_rows
from .sites import ModelDivision

# What transformers' `use_experts_implementation` (>= 5.17, < 6) puts on a module. Its
# forward takes tokens, and for each the chosen experts and their weights.
_OF_EXPERTS = frozenset({"config", "has_gate", "has_bias", "is_transposed"})


def find_row_wise(found: ModelDivision) -> tuple[RowWise, ...]:
    """`nn.Linear`, transformers' `Conv1D` and stacked experts, exactly these: what a
    subclass does with rows is its own affair. And what consists of such and of
    pointwise operations, as the whole of an MLP. In definition order."""
    modules: dict[nn.Module, None] = {}
    for site in found.sites:
        modules.update(dict.fromkeys(site.module.modules()))
    sites = {site.module for site in found.sites}
    row_wise = (_row_wise(module, sites) for module in modules)
    return tuple(filter(None, row_wise))


def _row_wise(module: nn.Module, sites: set[nn.Module]) -> RowWise | None:
    num_args = _num_args(module)
    if num_args is not None:
        return RowWise(module, num_args)
    _, *parts = module.modules()
    if not parts or not sites.isdisjoint((module, *parts)):  # nobody may wait in it
        return None
    return RowWise(module, 1, tuple(parts)) if takes_rows_to_rows(module) else None


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

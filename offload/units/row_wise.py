"""Finds the row-wise modules in sites, which may run once for several micro-batches."""

import sys

from torch import nn

from ...scheduler.sweep.coalescing import RowWise
from .experts import is_experts
from .row_probe import takes_rows_to_rows
from .sites import ModelDivision


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
    row_wise = (_row_wise(module, sites) for module in modules)
    return tuple(filter(None, row_wise))


def _row_wise(module: nn.Module, sites: set[nn.Module]) -> RowWise | None:
    num_args = _num_args(module)
    if num_args is not None:
        return RowWise(module, num_args)
    _, *parts = module.modules()
    # No micro-batch may wait for a site inside of a shared module.
    if not parts or not sites.isdisjoint((module, *parts)):
        return None
    return RowWise(module, 1, tuple(parts)) if takes_rows_to_rows(module) else None


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

"""Which matrix products of a model ranks divide, and what this rank has of each."""

import inspect
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Any

import torch
from torch import nn

from ...io.errors import UsageError
from ...io.weights.recipe import Recipe
from ..ranks.stage_modules import StageModules, find_stages
from .cut_experts import CutExperts, cut_experts, hold_part, uneven
from .row_cuts import Bounds, bounds_of, column_parts, row_parts, step_of

_READS = re.compile(
    r"self\.(\w+)\.(?:weight|bias)\b(?!\.(?:dtype|device|shape)| is (?:not )?None)"
)


@dataclass(frozen=True)
class CutLayer:
    """A product of which this rank computes the output rows `bounds[rank]`."""

    name: str
    module: nn.Module
    bounds: Bounds
    recipes: Mapping[str, Recipe]
    """Those of this rank, by the names of the model."""
    is_by_columns: bool
    """Whether the weight is stored as [inputs, outputs], as that of a Conv1D: a rank
    reads all of it, and keeps its part."""


@dataclass(frozen=True)
class CutLayers:
    """What `rank` has of a model whose products `num_ranks` ranks divide."""

    modules: StageModules
    layers: tuple[CutLayer, ...]
    experts: tuple[CutExperts, ...]
    recipes: Mapping[str, Recipe]
    """How all tensors are made on this rank."""
    whole_bytes: int
    """The bytes of the blocks that each rank streams and holds."""
    block_bytes: int
    """The bytes of all blocks."""

    @cached_property
    def notes(self) -> list[str]:
        """What is to be announced."""
        found = []
        if self.whole_bytes > self.block_bytes // 20:
            found.append(
                f"ranks: each of them streams and computes {self.whole_bytes:,} bytes "
                f"of {self.block_bytes:,} of the blocks: their rows are not divided"
            )
        found += filter(None, [uneven(self.experts)])
        if any(layer.is_by_columns for layer in self.layers):
            found.append(
                "ranks: the rows of a Conv1D are columns of its file: each rank reads "
                "all of it, and holds and computes its part"
            )
        return found


def cut_layers(
    model: Any, recipes: Mapping[str, Recipe], *, rank: int, num_ranks: int
) -> CutLayers:
    """Divides the products in the blocks of `model`, which is on meta and is changed:
    its layers have the rows of `rank`. Raises UsageError if it cannot be divided."""
    modules = find_stages(model)
    inside = {part for block in modules.blocks for part in block.modules()}
    experts = tuple(cut_experts(model, inside, recipes, rank=rank, num_ranks=num_ranks))
    uses = Counter(
        id(tensor) for part in model.modules() for tensor in part._parameters.values()
    )
    layers = []
    for name, module in model.named_modules():
        is_own = all(uses[id(tensor)] == 1 for tensor in module.parameters())
        is_own = is_own and not _is_read(model, name)
        if module in inside and is_own and _num_outputs(module):
            layer = _cut(name, module, recipes, rank, num_ranks)
            layers += [layer] if layer else []
    if not layers and not experts:
        raise UsageError(
            f"{type(model).__name__} has no matrix product in its blocks of which "
            f"{num_ranks} ranks could have a part each: take ranks: pipeline, or less "
            "ranks"
        )
    names = {id(one): name for name, one in model.named_parameters()}
    of_blocks = [
        names[id(one)] for block in modules.blocks for one in block.parameters()
    ]
    parts: tuple[CutLayer | CutExperts, ...] = (*layers, *experts)
    own = {name: one for part in parts for name, one in part.recipes.items()}
    nbytes = {name: recipes[name].nbytes for name in of_blocks if name in recipes}
    for layer in layers:
        _shrink(layer, rank)
    for one in experts:
        hold_part(one)
    return CutLayers(
        modules,
        tuple(layers),
        experts,
        {**recipes, **own},
        sum(size for name, size in nbytes.items() if name not in own),
        sum(nbytes.values()),
    )


def _is_read(model: nn.Module, name: str) -> bool:
    """Whether the code around the layer `name` reads its weight or bias itself, and
    would find a part of it (Mamba's `dt_proj`)."""
    parent, _, key = name.rpartition(".")
    kind: Any = type(model.get_submodule(parent))
    return key in _read_by(kind)


@cache
def _read_by(kind: Any) -> frozenset[str]:
    """The layers of a module of the class `kind` whose values its code reads."""
    try:
        return frozenset(_READS.findall(inspect.getsource(kind)))
    except (OSError, TypeError):  # the source is not there
        return frozenset()


def is_conv1d(module: nn.Module) -> bool:
    """Whether `module` is transformers' Conv1D."""
    kind = type(module)
    return kind.__name__ == "Conv1D" and kind.__module__.startswith("transformers.")


def _num_outputs(module: nn.Module) -> int:
    """The output rows of a product; 0 if `module` is none."""
    if type(module) is nn.Linear:
        return module.out_features
    return int(vars(module)["nf"]) if is_conv1d(module) else 0


def _cut(
    name: str,
    module: nn.Module,
    recipes: Mapping[str, Recipe],
    rank: int,
    num_ranks: int,
) -> CutLayer | None:
    """None if its rows are not divided."""
    is_by_columns = is_conv1d(module)
    weight, bias = recipes.get(f"{name}.weight"), recipes.get(f"{name}.bias")
    if weight is None or (module.bias is not None and bias is None):
        return None
    bounds = bounds_of(_num_outputs(module), num_ranks, step_of(weight))
    if bounds is None:
        return None
    parts = (column_parts if is_by_columns else row_parts)(weight, bounds)
    if parts is None:
        return None
    own = {f"{name}.weight": parts[rank]}
    if bias is not None:
        of_bias = row_parts(bias, bounds)
        if of_bias is None:
            return None
        own[f"{name}.bias"] = of_bias[rank]
    return CutLayer(name, module, bounds, own, is_by_columns)


def _shrink(layer: CutLayer, rank: int) -> None:
    low, high = layer.bounds[rank]
    setattr(layer.module, "nf" if layer.is_by_columns else "out_features", high - low)
    for name, recipe in layer.recipes.items():
        key = name.rpartition(".")[2]
        before = getattr(layer.module, key)
        made = torch.empty(recipe.shape, dtype=before.dtype, device=before.device)
        layer.module._parameters[key] = nn.Parameter(made, before.requires_grad)

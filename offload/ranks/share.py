"""What one rank has of a model, and what it leaves to others."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from ...io.errors import PenstockError
from ...io.weights.recipe import Recipe
from ...scheduler.ranks.owners import deal
from ...scheduler.ranks.stages import RankStages
from ..weights.placeholder import StreamedParameter
from .stage_modules import StageModules, costs_of, find_stages, returns_of


@dataclass(frozen=True)
class Share:
    """The stages of a model, who computes each, and the recipes of this rank."""

    modules: StageModules
    stages: RankStages
    recipes: Mapping[str, Recipe]


def share_of(
    model: Any,
    recipes: Mapping[str, Recipe],
    *,
    gather_rows: int,
    rank: int,
    num_ranks: int,
    device: str = "cpu",
) -> Share:
    """Divides the stages of `model`, which is on meta, among `num_ranks`. The weights
    that only other ranks use are replaced by placeholders, on `device`, that raise
    PenstockError. Raises UsageError if the model cannot be divided."""
    modules = find_stages(model)
    blocks, ends = costs_of(model, modules, recipes, gather_rows)
    owners = deal(blocks, ends, num_ranks)
    has_head = modules.head is not None
    stages = RankStages(
        (0, *owners, *((0,) if has_head else ())),
        rank,
        has_head,
        returns_of(model, modules.blocks),
    )
    elsewhere = [
        module for stage, module in enumerate(modules.all) if not stages.is_own(stage)
    ]
    gone = _leave_out(model, elsewhere, stages.rank, torch.device(device))
    kept = {name: one for name, one in recipes.items() if name not in gone}
    return Share(modules, stages, kept)


def _leave_out(
    model: nn.Module, elsewhere: list[nn.Module], rank: int, device: torch.device
) -> set[str]:
    """Replaces the tensors that only the modules `elsewhere` use. Returns all names of
    these tensors."""
    outside = {id(part) for module in elsewhere for part in module.modules()}
    used = {
        id(tensor)
        for part in model.modules()
        if id(part) not in outside
        for tensor in (*part._parameters.values(), *part._buffers.values())
    }
    made: dict[int, torch.Tensor] = {}
    gone: set[str] = set()
    for prefix, part in model.named_modules(remove_duplicate=False):
        if id(part) not in outside:
            continue
        stores: tuple[dict[str, Any], ...] = (part._parameters, part._buffers)
        for store in stores:
            for key, tensor in store.items():
                if tensor is None or id(tensor) in used:
                    continue
                name = f"{prefix}.{key}" if prefix else key
                gone.add(name)
                if isinstance(tensor, StreamedParameter):
                    continue
                if id(tensor) not in made:
                    made[id(tensor)] = _left_out(name, tensor, rank, device)
                    made[id(made[id(tensor)])] = made[id(tensor)]
                store[key] = made[id(tensor)]
    return gone


def _left_out(
    name: str, tensor: torch.Tensor, rank: int, device: torch.device
) -> torch.Tensor:
    """What stands for `tensor` on a rank that does not have it."""
    if not isinstance(tensor, nn.Parameter):
        return torch.zeros(tuple(tensor.shape), dtype=tensor.dtype, device=device)
    return StreamedParameter(
        name,
        tuple(tensor.shape),
        tensor.dtype,
        device,
        touch=partial(_touch, name, rank),
    )


def _touch(name: str, rank: int) -> torch.Tensor:
    raise PenstockError(
        f"{name!r} is on another rank than {rank}: only the forward of its block can "
        "be called here"
    )

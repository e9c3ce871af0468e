"""Which of a layer's stacked experts this rank holds, and which of them it computes."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import nn

from ...io.errors import UsageError
from ...io.weights.recipe import Recipe
from ..units.expert_cuts import cut
from ..units.experts import find_stacks, is_experts
from ..units.subtrees import ParameterRef
from .row_cuts import Bounds


@dataclass(frozen=True)
class CutExperts:
    """Stacked experts, of which rank r computes those in `bounds[r]`.

    Each rank holds as many: `ceil(num_experts / num_ranks)`, so that all ranks have the
    same division into units. Where this is more than it computes, a neighbour computes
    the others.
    """

    name: str
    module: nn.Module
    num_experts: int
    """Those of all ranks."""
    bounds: Bounds
    rank: int
    first: int
    """The first expert that this rank holds."""
    recipes: Mapping[str, Recipe]
    """Those of this rank, by the names of the model."""

    @property
    def num_held(self) -> int:
        return held_by_each(self.num_experts, len(self.bounds))


def held_by_each(num_experts: int, num_ranks: int) -> int:
    """How many experts of a layer each rank holds."""
    return -(-num_experts // num_ranks)


def expert_bounds(num_experts: int, num_ranks: int) -> Bounds:
    """The experts that each rank computes: ranges that differ in size by one at
    most."""
    starts = [num_experts * rank // num_ranks for rank in range(num_ranks + 1)]
    return list(pairwise(starts))


def first_held(num_experts: int, num_ranks: int, rank: int) -> int:
    """The first expert that `rank` holds; those that it computes are among its own."""
    start = expert_bounds(num_experts, num_ranks)[rank][0]
    return min(start, num_experts - held_by_each(num_experts, num_ranks))


def cut_experts(
    model: nn.Module,
    inside: set[nn.Module],
    recipes: Mapping[str, Recipe],
    *,
    rank: int,
    num_ranks: int,
) -> list[CutExperts]:
    """The stacked experts of `model` that are `inside` of its blocks. Raises UsageError
    for those that cannot be divided. Changes nothing."""
    names = {module: n for n, module in model.named_modules() if module in inside}
    if not any(map(_holds_stacks, names)):
        return []
    places = {n: place for n, place in _places(model).items() if n in recipes}
    stacks = find_stacks(model, places, recipes)
    made = []
    for module, name in names.items():
        stack = stacks.get(id(module))
        if stack is None and not is_experts(module):
            continue
        if stack is None:
            raise UsageError(
                f"ranks: tensor cannot divide the experts of {name} "
                f"({type(module).__name__}): a part of them can be neither read nor "
                "computed by itself, as far as is known; take ranks: pipeline, or "
                "ranks: gather"
            )
        num = stack.num_experts
        if num < num_ranks:
            raise UsageError(
                f"{type(model).__name__} has {num} experts a layer, and {num_ranks} "
                f"ranks are to divide them: take {num} ranks at most, or ranks: "
                "pipeline"
            )
        first = first_held(num, num_ranks, rank)
        last = first + held_by_each(num, num_ranks)
        parts = {
            tensor: cut(recipes[tensor], ((0, first), (first, last), (last, num)))[1]
            for tensor in stack.tensors.values()
        }
        bounds = expert_bounds(num, num_ranks)
        made.append(CutExperts(name, module, num, bounds, rank, first, parts))
    return made


def hold_part(experts: CutExperts) -> None:
    """Makes the module, which is on meta, one of the experts that this rank holds."""
    module = experts.module
    for key, value in vars(module).items():
        is_number = "experts" in key and type(value) is int
        if is_number and value == experts.num_experts:
            setattr(module, key, experts.num_held)
    for name, recipe in experts.recipes.items():
        key = name.rpartition(".")[2]
        before = module._parameters[key]
        assert before is not None, "it has a recipe"
        made = torch.empty(recipe.shape, dtype=before.dtype, device=before.device)
        module._parameters[key] = nn.Parameter(made, before.requires_grad)


def uneven(experts: tuple[CutExperts, ...]) -> str:
    """What to announce about experts that ranks hold in common; "" if none are."""
    for one in experts:
        if one.num_experts % len(one.bounds):
            return (
                f"ranks: {len(one.bounds)} ranks do not divide {one.num_experts} "
                f"experts evenly: each holds and streams {one.num_held} of a layer "
                f"({one.name}, ...), some of which a neighbour computes"
            )
    return ""


def _holds_stacks(module: nn.Module) -> bool:
    """Whether `module` may be one of stacked experts."""
    own = (one for one in module._parameters.values() if one is not None)
    return is_experts(module) or any(one.dim() == 3 for one in own)


def _places(model: nn.Module) -> dict[str, list[ParameterRef]]:
    """Where each parameter is, if it is in one place."""
    uses = Counter(
        id(tensor) for part in model.modules() for tensor in part._parameters.values()
    )
    return {
        f"{name}.{key}" if name else key: [ParameterRef(module, key)]
        for name, module in model.named_modules()
        for key, tensor in module._parameters.items()
        if tensor is not None and uses[id(tensor)] == 1
    }

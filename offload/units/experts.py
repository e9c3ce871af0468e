"""Finds the stacked experts of a model."""

import functools
import inspect
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from torch import nn

from ...io.weights.recipe import Recipe
from .expert_cuts import is_divisible, keeps_residues
from .expert_probe import num_dense_experts
from .expert_stack import ExpertStack
from .subtrees import ParameterRef

# The attributes that transformers' `use_experts_implementation` (>= 5.17, < 6) sets on
# a module. Its forward takes tokens, and for each token the chosen experts and their
# weights.
_OF_EXPERTS = frozenset({"config", "has_gate", "has_bias", "is_transposed"})
Way = Literal["in order", "sum", "batched"]
"""How the outputs of one token's experts become one: added in the order of experts, or
by a sum over the token's choices at the end. If "batched", by such a sum, too; and the
products of all (token, choice) pairs are one batch."""
_WAYS: Mapping[str | None, Way] = {"grouped_mm": "sum", "batched_mm": "batched"}
"""The way of transformers' implementations that are the same for all models."""
_IN_ORDER = "index_add_(0, token_idx,"
"""In the source of a forward that adds the outputs of one expert after the other."""


def is_experts(module: nn.Module) -> bool:
    """Whether `module` holds stacked experts, as transformers writes them."""
    has_gate = hasattr(type(module), "_apply_gate")
    return has_gate and set(vars(module)) >= _OF_EXPERTS


def way_of(module: nn.Module, kind: type) -> Way | None:
    """The way of the experts `module` of the class `kind`. None if it is not known."""
    config: Any = module.config
    name = getattr(config, "_experts_implementation", None)
    if name not in ("eager", None):
        return _WAYS.get(name)
    return "in order" if _adds_in_order(kind) else None


@functools.cache
def _adds_in_order(kind: Any) -> bool:
    forward = getattr(kind.forward, "__wrapped__", None)
    try:
        return forward is not None and _IN_ORDER in inspect.getsource(forward)
    except (OSError, TypeError):  # the source is not there
        return False


def find_stacks(
    model: nn.Module,
    places: Mapping[str, Sequence[ParameterRef]],
    recipes: Mapping[str, Recipe],
) -> dict[int, ExpertStack]:
    """The stacked experts of `model` that can be cut, by the id of their module."""
    used = {
        (id(where[0].module), where[0].key): name
        for name, where in places.items()
        if len(where) == 1
    }
    found = {}
    for name, module in model.named_modules():
        num = num_experts_of(module)
        if num is None:
            continue
        stack = _stack(name, module, num, used, recipes)
        if stack is not None:
            found[id(module)] = stack
    return found


def num_experts_of(module: nn.Module) -> int | None:
    """The number of experts that `module` holds, stacked so that a range of them can
    compute by itself. None if it is something else, or that is not known."""
    if not is_experts(module):
        return num_dense_experts(module)
    num = getattr(module, "num_experts", None)
    is_known = way_of(module, type(module)) is not None
    is_own = "forward" not in vars(module)
    is_parallel = getattr(module, "_is_expert_parallel", False)
    return num if is_known and is_own and not is_parallel else None


def _stack(
    name: str,
    module: nn.Module,
    num: int,
    used: Mapping[tuple[int, str], str],
    recipes: Mapping[str, Recipe],
) -> ExpertStack | None:
    keys = [key for key, value in module._parameters.items() if value is not None]
    tensors = {key: used.get((id(module), key), "") for key in keys}
    if num < 2 or not keys or "" in tensors.values():
        return None
    is_plain = all(not list(child.parameters()) for child in module.children())
    mine = [recipes[tensor] for tensor in tensors.values()]
    is_cut = all(r.shape[:1] == (num,) and is_divisible(r) for r in mine)
    if not is_plain or not is_cut or not all(map(keeps_residues, mine)):
        return None
    nbytes = sum(recipe.nbytes for recipe in mine)
    return ExpertStack(
        name, module, tensors, num, nbytes, is_dense=not is_experts(module)
    )

"""Computes what a model costs, from its modules on meta and its config."""

from collections import defaultdict
from collections.abc import Mapping, MutableMapping
from dataclasses import replace
from typing import Any

from torch import nn

from ...io.errors import UsageError
from ...io.weights.layout import Layout
from ...io.weights.recipe import Recipe
from ...scheduler.cost.shape import ModelShape, SiteCost, UnitCost
from ..traces.model_cache import ModelCache, model_cache
from ..traces.model_kind import base_of, completes, keeps_only_keys_and_values
from .division import Division
from .expert_probe import num_dense_experts
from .expert_stack import ExpertStack
from .sites import FoundSite

# How often the operations between matrix products touch an element, counted in
# transformers' Llama. A norm reads and writes each of its elements seven times. Results
# of products are rotated, activated or added, with two to ten touches.
TOUCHES_OF_NORM = 7
TOUCHES_OF_PRODUCT = 4


def describe(
    model: Any,
    division: Division,
    recipes: Mapping[str, Recipe],
    *,
    gathers_rows: bool,
    cache: ModelCache | None = None,
    dense: MutableMapping[nn.Module, bool] | None = None,
    has_units: bool = True,
) -> ModelShape:
    """The costs of `model`, as `division` divides it. The model may be on meta.

    Without its units (`has_units`), only those of its sites; units are not planned.
    `cache` says what it keeps of each token; it is found out if it is not given.
    `dense` keeps which modules compute all experts for each token, for other divisions
    of the model.
    """
    dense = {} if dense is None else dense
    config = model.config.get_text_config() if hasattr(model, "config") else None
    found = division.found
    cache = model_cache(model) if cache is None else cache
    head, base, share = _head_of(model), _base_of(model), active_share(config)
    divided = {id(each.stack.module): each.stack for each in found.stacks}
    sites = cache.put_into(
        [
            replace(
                _site(site, head, share, divided, dense),
                makes_hidden=base is None or id(site.module) in base,
            )
            for site in found.sites
        ],
        [site.module for site in found.sites],
    )
    return ModelShape(
        sites,
        _units(division) if has_units else (),
        itemsize=_itemsize(recipes),
        hidden=int(getattr(config, "hidden_size", 0) or 0),
        gathers_rows=gathers_rows,
        vocabulary=int(getattr(config, "vocab_size", 0) or 0),
        prompts_in_parts=completes(model) and keeps_only_keys_and_values(model),
        state_bytes=cache.state_bytes,
        note=cache.note,
    )


def _units(division: Division) -> tuple[UnitCost, ...]:
    plans = zip(division.found.units, division.layouts, division.transfers, strict=True)
    return tuple(
        UnitCost(
            unit.name,
            unit.sites,
            plan.stored_bytes,
            transfer.nbytes,
            _decoded(plan),
            unit.is_resident,
        )
        for unit, plan, transfer in plans
    )


def _site(
    site: FoundSite,
    head: nn.Module | None,
    share: float,
    divided: Mapping[int, ExpertStack],
    dense: MutableMapping[nn.Module, bool],
) -> SiteCost:
    """The costs of one site, without attention. `share` of the experts is active, but
    all of those that are `dense`, which is filled as needed."""
    flops = weights = pointwise = expert_flops = expert_weights = 0.0
    num_modules = num_products = vocabulary = 0
    part_of_stack = 1.0
    if site.experts is not None:
        low, high = site.experts
        part_of_stack = (high - low) / divided[id(site.module)].num_experts
    for part in site.module.modules():
        own = [p for p in part._parameters.values() if p is not None]
        if not own or isinstance(part, nn.Embedding):
            continue
        if site.experts is None and id(part) in divided:
            continue  # its windows are sites of their own
        num_modules += 1
        if part not in dense:
            dense[part] = num_dense_experts(part) is not None
        active_share = 1.0 if dense[part] else share
        for parameter in own:
            numel = parameter.numel() * part_of_stack
            if parameter.dim() == 1:
                if not _has_matrix(own):
                    pointwise += TOUCHES_OF_NORM * numel
                continue
            active = active_share if parameter.dim() == 3 else 1.0
            nbytes = numel * parameter.element_size()
            num_products += 1
            flops += 2.0 * numel * active
            weights += nbytes
            if active < 1.0:
                expert_flops += 2.0 * numel * active
                expert_weights += nbytes
            if part is not head:
                rows = numel / parameter.shape[-1]
                pointwise += TOUCHES_OF_PRODUCT * rows * active
        if part is head:
            vocabulary = int(next(iter(own)).shape[0])
    return SiteCost(
        site.name,
        flops_per_token=flops,
        weight_bytes=weights,
        expert_flops_per_token=expert_flops,
        expert_weight_bytes=expert_weights,
        expert_share=share if expert_flops else 1.0,
        num_modules=num_modules,
        num_products=num_products,
        pointwise_per_token=pointwise,
        vocabulary=vocabulary,
    )


def _base_of(model: Any) -> set[int] | None:
    """The ids of the modules that make hidden states; None if that is not known."""
    if not hasattr(model, "config") or not hasattr(model, "base_model_prefix"):
        return None
    try:
        return {id(part) for part in base_of(model).modules()}
    except UsageError:
        return None


def _has_matrix(parameters: list[nn.Parameter]) -> bool:
    return any(parameter.dim() > 1 for parameter in parameters)


def _head_of(model: Any) -> nn.Module | None:
    get = getattr(model, "get_output_embeddings", None)
    found = get() if callable(get) else None
    return found if isinstance(found, nn.Module) else None


def active_share(config: Any) -> float:
    """The share (0 to 1) of the stacked experts that a token goes through."""
    chosen = getattr(config, "num_experts_per_tok", None)
    names = ("num_local_experts", "num_experts", "n_routed_experts")
    there = next((n for name in names if (n := getattr(config, name, None))), None)
    return min(1.0, chosen / there) if chosen and there else 1.0


def _decoded(plan: Layout) -> tuple[tuple[str, int], ...]:
    """The codecs of a unit, each with the stored bytes that it takes."""
    return tuple(plan.decoded.items())


def _itemsize(recipes: Mapping[str, Recipe]) -> int:
    """Bytes of one element, in the dtype that most of the model computes with."""
    by_size: dict[int, int] = defaultdict(int)
    for recipe in recipes.values():
        by_size[recipe.dtype.itemsize] += recipe.nbytes
    return max(by_size, key=lambda size: by_size[size]) if by_size else 4

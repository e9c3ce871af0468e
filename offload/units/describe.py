"""Computes what a model costs, from its modules on meta and its config."""

import re
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import nn

from ...io.errors import UsageError
from ...io.weights.layout import Layout
from ...io.weights.recipe import Recipe
from ...scheduler.cost.shape import ModelShape, SiteCost, UnitCost
from .division import Division
from .model_kind import base_of, keeps_only_keys_and_values
from .sites import ModelDivision

# How often the operations between matrix products touch an element, counted in
# transformers' Llama. A norm reads and writes each of its elements seven times. Results
# of products are rotated, activated or added, with two to ten touches.
TOUCHES_OF_NORM = 7
TOUCHES_OF_PRODUCT = 4

_LAYER = re.compile(r"^(.*?\.\d+)(?:\.|$)")


def describe(
    model: Any, division: Division, recipes: Mapping[str, Recipe], gathers_rows: bool
) -> ModelShape:
    """The costs of `model`, as `division` divides it. The model may be on meta."""
    config = model.config.get_text_config() if hasattr(model, "config") else None
    found = division.found
    head = _head_of(model)
    attention = _attention(found, config)
    base = _base_of(model)
    sites = tuple(
        replace(
            _site(site.name, site.module, head, config, attention.get(index)),
            makes_hidden=base is None or id(site.module) in base,
        )
        for index, site in enumerate(found.sites)
    )
    units = tuple(
        UnitCost(
            unit.name,
            unit.sites,
            plan.stored_bytes,
            transfer.nbytes,
            _decoded(plan),
            unit.is_resident,
        )
        for unit, plan, transfer in zip(
            found.units, division.layouts, division.transfers, strict=True
        )
    )
    return ModelShape(
        sites,
        units,
        itemsize=_itemsize(recipes),
        hidden=int(getattr(config, "hidden_size", 0) or 0),
        gathers_rows=gathers_rows,
        vocabulary=int(getattr(config, "vocab_size", 0) or 0),
        prompts_in_parts=_completes(model) and keeps_only_keys_and_values(model),
    )


def _completes(model: Any) -> bool:
    can_generate = getattr(model, "can_generate", None)
    return callable(can_generate) and bool(can_generate())


def _site(
    name: str,
    module: nn.Module,
    head: nn.Module | None,
    config: Any,
    attention: tuple[int, int, int | None] | None,
) -> SiteCost:
    width, kv, window = attention or (0, 0, None)
    active = _active_share(config)
    flops = weights = pointwise = 0.0
    num_modules = num_products = vocabulary = 0
    for part in module.modules():
        own = [p for p in part._parameters.values() if p is not None]
        if not own or isinstance(part, nn.Embedding):
            continue
        num_modules += 1
        for parameter in own:
            numel = parameter.numel()
            if parameter.dim() == 1:
                if not _has_matrix(own):
                    pointwise += TOUCHES_OF_NORM * numel
                continue
            share = active if parameter.dim() == 3 else 1.0
            num_products += 1
            flops += 2.0 * numel * share
            weights += numel * parameter.element_size()
            if part is not head:
                rows = numel / parameter.shape[-1]
                pointwise += TOUCHES_OF_PRODUCT * rows * share
        if part is head:
            vocabulary = int(next(iter(own)).shape[0])
    return SiteCost(
        name,
        flops_per_token=flops,
        weight_bytes=weights,
        num_modules=num_modules,
        num_products=num_products,
        pointwise_per_token=pointwise,
        attention_width=width,
        kv_per_token=kv,
        attention_window=window,
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


def _active_share(config: Any) -> float:
    """The share (0 to 1) of the stacked experts that a token goes through."""
    chosen = getattr(config, "num_experts_per_tok", None)
    names = ("num_local_experts", "num_experts", "n_routed_experts")
    there = next((n for name in names if (n := getattr(config, name, None))), None)
    return min(1.0, chosen / there) if chosen and there else 1.0


def _attention(
    found: ModelDivision, config: Any
) -> dict[int, tuple[int, int, int | None]]:
    """(width, elements of keys and values per token, window) of each site that attends,
    by its index.

    In each layer that is the first site with "att" in its name, or its first site.
    """
    heads = getattr(config, "num_attention_heads", None)
    if not isinstance(heads, int):
        return {}
    layers: dict[str, list[int]] = defaultdict(list)
    for index, site in enumerate(found.sites):
        if (match := _LAYER.match(site.name)) is not None:
            layers[match[1]].append(index)
    kinds = getattr(config, "layer_types", None) or []
    result = {}
    for number, (_, sites) in enumerate(layers.items()):
        kind = kinds[number] if number < len(kinds) else "full_attention"
        if "attention" not in kind or kind == "linear_attention":
            continue
        named = [s for s in sites if "att" in found.sites[s].name.lower()]
        window = getattr(config, "sliding_window", None)
        is_sliding = kind == "sliding_attention" and window
        width, kv = _widths(config, heads)
        result[(named or sites)[0]] = (width, kv, window if is_sliding else None)
    return result


def _widths(config: Any, heads: int) -> tuple[int, int]:
    """The width of all heads together, and the elements of the keys and values that one
    token adds."""
    if getattr(config, "kv_lora_rank", None):  # transformers keeps them expanded
        keys = config.qk_nope_head_dim + config.qk_rope_head_dim
        return heads * keys, heads * (keys + config.v_head_dim)
    size = getattr(config, "head_dim", None) or config.hidden_size // heads
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    if getattr(config, "multi_query", False):
        kv_heads = 1
    return heads * size, 2 * kv_heads * size


def _decoded(plan: Layout) -> tuple[tuple[str, int], ...]:
    """The codecs of a unit, each with the stored bytes that it takes."""
    return tuple(plan.decoded.items())


def _itemsize(recipes: Mapping[str, Recipe]) -> int:
    """Bytes of one element, in the dtype that most of the model computes with."""
    by_size: dict[int, int] = defaultdict(int)
    for recipe in recipes.values():
        by_size[recipe.dtype.itemsize] += recipe.nbytes
    return max(by_size, key=lambda size: by_size[size]) if by_size else 4

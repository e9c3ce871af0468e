"""Runs attention on the device that holds the keys and values: on the CPU for those in
host memory.

Depends on how transformers chooses a model's attention; a contract test watches that.
"""

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

_NAME = "penstock_where_keys_are"


def attend(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """transformers' `sdpa` attention, on the device of `key` and `value`.

    `query`, `key` and `value` are [batch, heads, tokens, dim] of one dtype. If `query`
    is on another device than `key`, it is copied there, and the result [batch, tokens,
    heads, dim] is copied back.
    """
    home, there = query.device, key.device
    if home == there:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, **kwargs
        )
    moved: dict[str, Any] = {
        name: each.to(there) if isinstance(each, torch.Tensor) else each
        for name, each in kwargs.items()
    }
    mask = None if attention_mask is None else attention_mask.to(there)
    found, _ = sdpa_attention_forward(
        module, query.to(there), key, value, mask, **moved
    )
    return found.to(home), None


def install(model: Any) -> Callable[[], None] | None:
    """Makes `model` attend where its keys are.

    Returns a function that undoes this; None if the model does not use transformers'
    `sdpa` attention.
    """
    if getattr(model.config, "_attn_implementation", None) != "sdpa":
        return None
    AttentionInterface.register(_NAME, attend)
    AttentionMaskInterface.register(_NAME, sdpa_mask)
    model.set_attn_implementation(_NAME)
    if not _all_have(model, _NAME):
        model.set_attn_implementation("sdpa")
        return None
    weak = weakref.ref(model)  # the function that undoes it must not keep the model

    def undo() -> None:
        if (there := weak()) is not None:
            there.set_attn_implementation("sdpa")

    return undo


def _all_have(model: Any, name: str) -> bool:
    """Whether all parts of the model use the attention `name`."""
    configs = (getattr(module, "config", None) for module in model.modules())
    return all(
        getattr(config, "_attn_implementation", name) == name
        for config in configs
        if config is not None
    )

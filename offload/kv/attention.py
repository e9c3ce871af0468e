"""Attention where keys and values are: by the CPU, for those in host memory.

Knows how transformers chooses a model's attention; under a contract test.
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
    """transformers' `sdpa`; where `key` is on another device than `query`, there: the
    query ([batch, heads, tokens, dim]) goes and what comes of it comes back."""
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
    """From now on `model` attends where keys are; call what is returned to undo it.
    None: its attention is another one than transformers' `sdpa`."""
    if getattr(model.config, "_attn_implementation", None) != "sdpa":
        return None
    AttentionInterface.register(_NAME, attend)
    AttentionMaskInterface.register(_NAME, sdpa_mask)
    model.set_attn_implementation(_NAME)
    if not _all_have(model, _NAME):
        model.set_attn_implementation("sdpa")
        return None
    weak = weakref.ref(model)  # whoever is to undo it must not keep the model

    def undo() -> None:
        if (there := weak()) is not None:
            there.set_attn_implementation("sdpa")

    return undo


def _all_have(model: Any, name: str) -> bool:
    """Whether each part of the model could be told."""
    configs = (getattr(module, "config", None) for module in model.modules())
    return all(
        getattr(config, "_attn_implementation", name) == name
        for config in configs
        if config is not None
    )

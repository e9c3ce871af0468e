"""Several continuations of one prompt, whose computation they share."""

import copy
import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from transformers import DynamicCache

from .decoding import keeps_only_keys_and_values


def _shared(layer: Any, repeats: torch.Tensor) -> Any:
    """`layer` of a cache as those that go on from it see it, each as its own: it holds
    the prompts once, and keeps nothing of what comes after."""

    def update(
        keys: torch.Tensor, values: torch.Tensor, *args: Any, **kwargs: Any
    ) -> Any:
        """[continuations, heads, tokens, dim] behind those of their prompts."""
        own = copy.copy(layer)
        own.keys = own.keys.index_select(0, repeats)
        own.values = own.values.index_select(0, repeats)
        return own.update(keys, values, *args, **kwargs)

    found = copy.copy(layer)
    found.update = update
    return found


class SharedPrompts:
    """Prompts that were run once, and what goes on from them.

    `ids` and `mask` are [prompts, tokens], padded on the left. `model` keeps only keys
    and values, and takes `logits_to_keep`.
    """

    def __init__(self, model: nn.Module, ids: torch.Tensor, mask: torch.Tensor) -> None:
        self._model: Any = model
        self._mask = mask
        config = self._model.config.get_text_config(decoder=True)
        self._cache = DynamicCache(config=config)
        outputs = self._call(ids, mask, mask, self._cache, logits_to_keep=1)
        self.logits: torch.Tensor = outputs.logits[:, -1].float()
        """[prompts, vocabulary]: of what comes first behind each."""

    def logits_behind(
        self, ids: torch.Tensor, mask: torch.Tensor, prompts: Sequence[int]
    ) -> torch.Tensor:
        """float32 [continuations, tokens, vocabulary] of `ids` [continuations, tokens],
        padded on the right; each behind one of `prompts` (their numbers)."""
        repeats = torch.tensor(prompts, device=ids.device)
        cache = copy.copy(self._cache)
        cache.layers = [_shared(layer, repeats) for layer in cache.layers]
        whole = torch.cat([self._mask[repeats], mask], dim=1)
        outputs = self._call(ids, whole, mask, cache, logits_to_keep=0)
        return outputs.logits.float()  # type: ignore[no-any-return]

    def _call(
        self,
        ids: torch.Tensor,
        whole: torch.Tensor,
        mask: torch.Tensor,
        cache: Any,
        *,
        logits_to_keep: int,
    ) -> Any:
        """`mask` is of `ids`, `whole` of what was before, too."""
        inputs = {
            "input_ids": ids,
            "attention_mask": whole,
            "past_key_values": cache,
            "use_cache": True,
            "logits_to_keep": logits_to_keep,
        }
        if "position_ids" in _parameters(self._model):
            places = (whole.cumsum(-1) - 1).clamp(min=0)
            inputs["position_ids"] = places[:, -mask.shape[1] :]
        return self._model(**inputs)


def _parameters(model: Any) -> Any:
    return inspect.signature(type(model).forward).parameters


def can_share(model: Any) -> bool:
    """Whether prompts of `model` can be gone on from by several."""
    return "logits_to_keep" in _parameters(model) and keeps_only_keys_and_values(model)

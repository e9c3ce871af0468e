"""Several continuations of one prompt, whose computation they share."""

import copy
import inspect
from collections.abc import Sequence
from typing import Any

import torch
from transformers import DynamicCache

from ..units.model_kind import keeps_only_keys_and_values
from .head import CausalScorer


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
    """Prompts that are run once, and what goes on from them.

    `ids` and `mask` are [prompts, tokens], padded on the left. `model` is one that
    `can_share`, `scorer` its scorer.
    """

    def __init__(
        self, model: Any, scorer: CausalScorer, ids: torch.Tensor, mask: torch.Tensor
    ) -> None:
        self._scorer = scorer
        self._mask = mask
        self._has_places = "position_ids" in _parameters(model)
        config = model.config.get_text_config(decoder=True)
        self._cache = DynamicCache(config=config)
        self.logits = scorer.next_logits(
            ids,
            mask,
            past_key_values=self._cache,
            use_cache=True,
            **self._places(mask, ids.shape[1]),
        )
        """float32 [prompts, vocabulary]: of what comes first behind each."""

    def log_probabilities(
        self, ids: torch.Tensor, mask: torch.Tensor, prompts: Sequence[int]
    ) -> torch.Tensor:
        """float32 [continuations, tokens - 1]: of all but the first of `ids`
        [continuations, tokens], padded on the right, each behind one of `prompts`
        (their numbers)."""
        repeats = torch.tensor(prompts, device=ids.device)
        cache = copy.copy(self._cache)
        cache.layers = [_shared(layer, repeats) for layer in cache.layers]
        whole = torch.cat([self._mask[repeats], mask], dim=1)
        return self._scorer.log_probabilities(
            ids,
            whole,
            past_key_values=cache,
            use_cache=True,
            **self._places(whole, ids.shape[1]),
        )

    def _places(self, whole: torch.Tensor, num: int) -> dict[str, torch.Tensor]:
        """Positions of the last `num` tokens; the mask `whole` counts those before."""
        if not self._has_places:
            return {}
        return {"position_ids": (whole.cumsum(-1) - 1).clamp(min=0)[:, -num:]}


def can_share(model: Any) -> bool:
    """Whether prompts of `model` can be gone on from by several."""
    return keeps_only_keys_and_values(model)


def _parameters(model: Any) -> Any:
    return inspect.signature(type(model).forward).parameters

"""Computes several continuations of one prompt, and the prompt only once."""

import copy
import inspect
from collections.abc import Sequence
from typing import Any

import torch
from transformers import DynamicCache

from ...io.devices.known import rows_of
from ...io.devices.queued_copy import queued_to
from ..traces.model_kind import keeps_only_keys_and_values
from .head import CausalScorer


def _shared(layer: Any, repeats: torch.Tensor) -> Any:
    """A copy of a cache's `layer` for continuations: each of them sees the keys and
    values of its prompt, and those of the continuation are not kept."""

    def update(
        keys: torch.Tensor, values: torch.Tensor, *args: Any, **kwargs: Any
    ) -> Any:
        """Appends `keys` and `values` [continuations, heads, tokens, dim] to those of
        the prompts that they continue."""
        own = copy.copy(layer)
        own.keys = own.keys.index_select(0, repeats)
        own.values = own.values.index_select(0, repeats)
        return own.update(keys, values, *args, **kwargs)

    found = copy.copy(layer)
    found.update = update
    return found


class SharedPrompts:
    """Prompts that are run once, and log-probabilities of what may follow them.

    `ids` and `mask` are int64 [prompts, tokens], padded on the left. `model` is one
    that `can_share` accepts, `scorer` its scorer.
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
        """The logits of the token that follows each prompt: float32 [prompts,
        vocabulary]."""

    def log_probabilities(
        self, ids: torch.Tensor, mask: torch.Tensor, prompts: Sequence[int]
    ) -> torch.Tensor:
        """The log-probabilities of all but the first token of each continuation:
        float32 [continuations, tokens - 1]. `ids` and `mask` are [continuations,
        tokens], padded on the right; `prompts` has the number of the prompt that each
        one continues."""
        repeats = queued_to(torch.tensor(prompts), ids.device)
        cache = copy.copy(self._cache)
        cache.layers = [_shared(layer, repeats) for layer in cache.layers]
        whole = torch.cat([rows_of(self._mask, prompts), mask], dim=1)
        return self._scorer.log_probabilities(
            ids,
            whole,
            past_key_values=cache,
            use_cache=True,
            **self._places(whole, ids.shape[1]),
        )

    def _places(self, whole: torch.Tensor, num: int) -> dict[str, torch.Tensor]:
        """The positions of the last `num` tokens of `whole`, a mask of all tokens, as
        the model's `position_ids`; nothing for models that take none."""
        if not self._has_places:
            return {}
        return {"position_ids": (whole.cumsum(-1) - 1).clamp(min=0)[:, -num:]}


def can_share(model: Any) -> bool:
    """Whether `model` can continue one run of a prompt several times."""
    return keeps_only_keys_and_values(model)


def _parameters(model: Any) -> Any:
    return inspect.signature(type(model).forward).parameters

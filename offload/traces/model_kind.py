"""Answers questions about a transformers model by its class: its base, its states."""

import inspect
from typing import Any

from ...io.errors import UsageError


def base_of(model: Any) -> Any:
    """The module that makes hidden states of token ids, without a head. Raises
    UsageError if there is none."""
    if model.config.is_encoder_decoder:
        return model.get_encoder()
    base = getattr(model, model.base_model_prefix, model)
    if not hasattr(base, "get_input_embeddings"):
        raise UsageError(
            f"{type(model).__name__} has no base that makes hidden states of tokens: "
            "it cannot embed"
        )
    return base


def completes(model: Any) -> bool:
    """Whether transformers' `generate` runs on `model`."""
    can_generate = getattr(model, "can_generate", None)
    return callable(can_generate) and bool(can_generate())


def keeps_only_keys_and_values(model: Any) -> bool:
    """Whether the model's layers keep keys and values, and no other states.

    Only then can a prompt be processed in several calls, and can rows leave a batch.
    Layers with another state may silently reset it in each call of more than one token.
    `model` may be on meta.
    """
    from transformers import DynamicCache  # takes seconds to import

    config = model.config.get_text_config(decoder=True)
    return (
        not model.config.is_encoder_decoder
        and not getattr(model, "_is_stateful", False)
        and "past_key_values" in inspect.signature(model.forward).parameters
        and is_plain(DynamicCache(config=config))
    )


def is_plain(cache: Any) -> bool:
    """Whether `cache` holds only keys and values, as transformers makes it."""
    from transformers import DynamicCache
    from transformers.cache_utils import DynamicLayer

    return type(cache) is DynamicCache and all(
        isinstance(layer, DynamicLayer) for layer in cache.layers
    )

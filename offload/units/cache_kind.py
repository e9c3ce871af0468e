"""What kind of states a model's layers keep between two calls of `generate`."""

import inspect
from typing import Any


def keeps_only_keys_and_values(model: Any) -> bool:
    """Whether a prompt may come in with several calls, and a row may leave. Layers with
    a state of another kind may begin it anew at every call of more than one token, and
    say nothing. `model` may be on meta."""
    from transformers import DynamicCache  # takes seconds to import

    config = model.config.get_text_config(decoder=True)
    return (
        not model.config.is_encoder_decoder
        and not getattr(model, "_is_stateful", False)
        and "past_key_values" in inspect.signature(model.forward).parameters
        and is_plain(DynamicCache(config=config))
    )


def is_plain(cache: Any) -> bool:
    """Whether it is one of keys and values alone, as transformers makes it."""
    from transformers import DynamicCache
    from transformers.cache_utils import DynamicLayer

    return type(cache) is DynamicCache and all(
        isinstance(layer, DynamicLayer) for layer in cache.layers
    )

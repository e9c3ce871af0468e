"""The part of a model that makes hidden states, without its head."""

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

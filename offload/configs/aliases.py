"""Names of published models that transformers has under other names.

Their config.json names code of their own (`auto_map`), which is never run: transformers
has the same architecture, and its own class is used.
"""

import inspect
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_MODEL_TYPES = {
    "kimi_k2": "deepseek_v3",
    "minimax_m1": "minimax",
    "minimax_text_01": "minimax",
}
"""The `model_type` of transformers, by the one in config.json."""
_CLASSES = {
    "KimiK25ForConditionalGeneration": "Kimi_K25ForConditionalGeneration",
    "MiniMaxM1ForCausalLM": "MiniMaxForCausalLM",
    "MiniMaxText01ForCausalLM": "MiniMaxForCausalLM",
}
"""The class of transformers, by the one in `architectures`."""
_MINIMAX = {
    "layernorm_full_attention_alpha": "full_attn_alpha_factor",
    "layernorm_full_attention_beta": "full_attn_beta_factor",
    "layernorm_linear_attention_alpha": "linear_attn_alpha_factor",
    "layernorm_linear_attention_beta": "linear_attn_beta_factor",
    "layernorm_mlp_alpha": "mlp_alpha_factor",
    "layernorm_mlp_beta": "mlp_beta_factor",
}
_LEFT_OUT = ("auto_map", "attn_implementation", "_attn_implementation")
"""Keys that name code of others."""
_MAPPINGS = (
    "MODEL_FOR_CAUSAL_LM_MAPPING",
    "MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING",
    "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING",
    "MODEL_FOR_MASKED_LM_MAPPING",
    "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING",
    "MODEL_MAPPING",
)
"""Transformers' classes for configs."""


def known_type(values: Mapping[str, Any]) -> str | None:
    """The `model_type` that transformers has for a config.json with `values`; None if
    it has none."""
    import transformers  # takes seconds

    kind = values.get("model_type")
    if not isinstance(kind, str):
        return None
    kind = _MODEL_TYPES.get(kind, kind)
    return kind if kind in transformers.CONFIG_MAPPING else None


def is_renamed(values: Mapping[str, Any]) -> bool:
    """Whether transformers has the model of `values` under another name."""
    names = values.get("architectures") or []
    has_class = isinstance(names, list) and any(
        isinstance(name, str) and name in _CLASSES for name in names
    )
    kind = values.get("model_type")
    return has_class or (isinstance(kind, str) and kind in _MODEL_TYPES)


def renamed(values: Mapping[str, Any]) -> dict[str, Any]:
    """`values` of a config.json with the names that transformers has, and without names
    of code."""
    made = {
        key: renamed(value) if isinstance(value, Mapping) else value
        for key, value in values.items()
        if key not in _LEFT_OUT
    }
    kind = made.get("model_type")
    if kind in ("minimax_m1", "minimax_text_01"):
        made = _minimax(made)
    if isinstance(kind, str) and kind in _MODEL_TYPES:
        made["model_type"] = _MODEL_TYPES[kind]
    names = made.get("architectures")
    if isinstance(names, list):
        made["architectures"] = [
            _CLASSES.get(name, name) if isinstance(name, str) else name
            for name in names
        ]
    return made


def _minimax(values: Mapping[str, Any]) -> dict[str, Any]:
    made = {_MINIMAX.get(key, key): value for key, value in values.items()}
    kinds = made.pop("attn_type_list", None)
    if isinstance(kinds, list):
        made["layer_types"] = [
            "full_attention" if kind else "linear_attention" for kind in kinds
        ]
    return made


def registered_class(config: Any, names: list[str]) -> "type[PreTrainedModel] | None":
    """The class that transformers has for `config`, if one of the `names` only spells
    it otherwise (LLaMAForCausalLM); else None."""
    import transformers
    from transformers import PreTrainedModel

    spelled = {_spelling(name) for name in names}
    for mapping in _MAPPINGS:
        found: Any = getattr(transformers, mapping, {})
        made = found.get(type(config), ())
        for kind in made if isinstance(made, tuple) else (made,):
            is_model = inspect.isclass(kind) and issubclass(kind, PreTrainedModel)
            if is_model and _spelling(kind.__name__) in spelled:
                found_class: type[PreTrainedModel] = kind
                return found_class
    return None


def _spelling(name: str) -> str:
    return name.replace("_", "").casefold()

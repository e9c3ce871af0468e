"""Published configs, and small models of the same structure."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

CONFIGS = Path(__file__).parents[1] / "plans" / "configs"
NAMES = sorted(path.stem for path in CONFIGS.glob("*.json"))

_MOST: dict[str, Any] = {
    "vocab_size": 320,
    "bos_token_id": 1,
    "eos_token_id": None,
    "pad_token_id": 0,
    "hidden_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 96,
    "head_dim": 16,
}
_FEW_EXPERTS: dict[str, Any] = {"moe_intermediate_size": 32, "num_experts_per_tok": 4}
_LATENT: dict[str, Any] = {
    **_MOST,
    **_FEW_EXPERTS,
    "num_key_value_heads": 4,
    "n_routed_experts": 16,
    "first_k_dense_replace": 2,
    "q_lora_rank": 24,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 8,
    "head_dim": 8,
    "n_group": 1,
    "topk_group": 1,
}
_INDEXED: dict[str, Any] = {
    **_LATENT,
    "index_head_dim": 16,
    "index_n_heads": 4,
    "index_topk": 8,
}
_QWEN: dict[str, Any] = {**_MOST, **_FEW_EXPERTS, "num_experts": 16}
_LINEAR: dict[str, Any] = {
    **_QWEN,
    "num_hidden_layers": 8,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_num_key_heads": 4,
    "linear_num_value_heads": 8,
    "shared_expert_intermediate_size": 32,
}
_LOCAL: dict[str, Any] = {**_MOST, "num_local_experts": 8, "num_experts_per_tok": 2}
_MIXED = ["linear_attention", "full_attention"] * 2
_MROPE = {"rope_type": "default", "mrope_section": [4, 2, 2], "mrope_interleaved": True}
_SEES: dict[str, Any] = {
    "depth": 3,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_heads": 4,
    "out_hidden_size": 64,
    "num_position_embeddings": 16,
}
SMALL: dict[str, dict[str, Any]] = {
    "bloom-176b": {
        "vocab_size": 320,
        "n_embed": 64,
        "n_layer": 4,
        "num_attention_heads": 4,
    },
    "command-r-plus": _MOST,
    "deepseek-v3": _LATENT,
    "deepseek-v3.2": _INDEXED,
    "falcon-180b": {
        "vocab_size": 320,
        "hidden_size": 64,
        "num_hidden_layers": 4,
        "num_attention_heads": 8,
        "num_kv_heads": 2,
    },
    "glm-4.5": {**_QWEN, "n_routed_experts": 16, "first_k_dense_replace": 2},
    "glm-5": {**_INDEXED, "qk_head_dim": 16, "indexer_types": None},
    "gpt-oss-120b": {
        **_LOCAL,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "sliding_window": 8,
    },
    "kimi-k2": _LATENT,
    "llama-3.1-405b": _MOST,
    "llama-4-maverick": {
        "text_config": {
            **_LOCAL,
            "num_experts_per_tok": 1,
            "intermediate_size_mlp": 96,
            "attention_chunk_size": 8,
        },
        "vision_config": {
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "image_size": 28,
            "patch_size": 14,
            "vision_output_dim": 64,
            "projector_input_dim": 64,
            "projector_output_dim": 64,
        },
    },
    "minimax-m1-official": {
        **_LOCAL,
        "attn_type_list": [0, 1] * 2,
        "rotary_dim": 8,
        "block_size": 16,
    },
    "minimax-m1-hf": {
        **_LOCAL,
        "layer_types": _MIXED,
        "rotary_dim": 8,
        "block_size": 16,
    },
    "minimax-m2.5": {**_LOCAL, "intermediate_size": 32, "rotary_dim": 8},
    "mistral-large-2": _MOST,
    "mixtral-8x22b": _LOCAL,
    "opt-175b": {**_MOST, "word_embed_proj_dim": 64, "ffn_dim": 256},
    "qwen2.5-vl-72b": {
        **_MOST,
        "rope_scaling": {"type": "mrope", "mrope_section": [2, 3, 3]},
        "vision_config": {
            "depth": 2,
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_heads": 4,
            "out_hidden_size": 64,
            "fullatt_block_indexes": [1],
        },
    },
    "qwen3-235b": _QWEN,
    "qwen3-coder-480b": _QWEN,
    "qwen3-next-80b": _LINEAR,
    "qwen3-vl-235b": {
        "text_config": {**_QWEN, "rope_scaling": _MROPE},
        "vision_config": {**_SEES, "deepstack_visual_indexes": [0, 1]},
    },
    "qwen3.5-397b": {
        "text_config": {
            **_LINEAR,
            "layer_types": (["linear_attention"] * 3 + ["full_attention"]) * 2,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 10000,
                "partial_rotary_factor": 0.5,
                "mrope_interleaved": True,
                "mrope_section": [2, 1, 1],
            },
        },
        "vision_config": {**_SEES, "deepstack_visual_indexes": []},
    },
}
"""What makes the structure of a published model small: keys of its config."""


def published(name: str) -> dict[str, Any]:
    """The values of a published config.json."""
    found: dict[str, Any] = json.loads((CONFIGS / f"{name}.json").read_text())
    return found


def small(name: str) -> dict[str, Any]:
    """The config of a small model like the published one, unquantised, in float32."""
    found = _merged(published(name), SMALL[name])
    for part in (found, found.get("text_config"), found.get("vision_config")):
        if part is not None:
            part.pop("quantization_config", None)
            part["dtype"] = "float32"
            part.pop("torch_dtype", None)
    return found


def write(folder: Path, values: Mapping[str, Any]) -> Path:
    """A folder with nothing but a config.json of these values."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(values))
    return folder


def _merged(values: Mapping[str, Any], others: Mapping[str, Any]) -> dict[str, Any]:
    found = dict(values)
    for key, value in others.items():
        old = found.get(key)
        both = isinstance(old, dict) and key.endswith("_config")
        found[key] = _merged(old, value) if both and old is not None else value
    return found

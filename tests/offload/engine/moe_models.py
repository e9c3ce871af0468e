"""Small models with experts for tests: their checkpoints, and inputs for them."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    DeepseekV3Config,
    Llama4TextConfig,
    PreTrainedConfig,
    Qwen3MoeConfig,
)

NUM_EXPERTS = 16
_COMMON: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 64,
    "moe_intermediate_size": 64,
    "num_attention_heads": 4,
    "num_experts_per_tok": 4,
    "bos_token_id": 1,
    "eos_token_id": None,
    "pad_token_id": 0,
}
CONFIGS: dict[str, PreTrainedConfig] = {
    "qwen3_moe": Qwen3MoeConfig(
        **_COMMON,
        num_hidden_layers=3,
        num_key_value_heads=2,
        num_experts=NUM_EXPERTS,
        norm_topk_prob=True,
    ),
    "llama4": Llama4TextConfig(  # whose experts each compute all tokens
        **{**_COMMON, "num_experts_per_tok": 1},
        intermediate_size_mlp=64,
        num_hidden_layers=3,
        num_key_value_heads=2,
        head_dim=16,
        num_local_experts=NUM_EXPERTS,
        interleave_moe_layer_step=1,
        attention_chunk_size=8,
    ),
    "odd": Qwen3MoeConfig(  # an expert's matrices are no multiples of 64 bytes
        **{**_COMMON, "hidden_size": 34, "moe_intermediate_size": 17, "head_dim": 16},
        num_hidden_layers=2,
        num_key_value_heads=2,
        num_experts=NUM_EXPERTS,
    ),
    "deepseek_v3": DeepseekV3Config(
        **_COMMON,
        num_hidden_layers=3,
        num_key_value_heads=4,
        first_k_dense_replace=1,
        n_routed_experts=NUM_EXPERTS,
        n_shared_experts=1,
        n_group=1,
        topk_group=1,
        kv_lora_rank=32,
        q_lora_rank=32,
        qk_nope_head_dim=16,
        qk_rope_head_dim=16,
        v_head_dim=16,
    ),
}
GREEDY = {"max_new_tokens": 5, "do_sample": False}


@functools.cache
def resident(name: str, dtype: torch.dtype) -> Any:
    """A model with random weights, such that routers choose all experts."""
    torch.manual_seed(0)
    kind: Any = AutoModelForCausalLM
    model = kind.from_config(CONFIGS[name], dtype=dtype).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def checkpoint(folder: Path, name: str, dtype: torch.dtype = torch.float32) -> Path:
    resident(name, dtype).save_pretrained(folder)
    return folder


def batches(num: int, size: int = 2, length: int = 6) -> list[dict[str, torch.Tensor]]:
    """Token ids of prompts, `size` in each micro-batch."""
    made = torch.Generator().manual_seed(num)
    ids = torch.randint(3, 96, (num, size, length), generator=made)
    return [{"input_ids": i, "attention_mask": torch.ones_like(i)} for i in ids]


def expert_bytes(model: Any) -> int:
    """Bytes of one expert."""
    layer = model.model.layers[-1]
    block = layer.feed_forward if hasattr(layer, "feed_forward") else layer.mlp
    experts = block.experts
    return sum(int(p.nbytes) for p in experts.parameters()) // NUM_EXPERTS


def layer_bytes(model: Any) -> int:
    """Bytes of a layer with experts."""
    return sum(int(p.nbytes) for p in model.model.layers[-1].parameters())

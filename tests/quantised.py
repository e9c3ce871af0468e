"""Writes small quantised checkpoints, and has transformers dequantise them."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    DeepseekV3Config,
    FineGrainedFP8Config,
    LlamaConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen3MoeConfig,
)

from penstock.io.checkpoint.index import SINGLE_FILE

Tensors = dict[str, torch.Tensor]

_COMMON: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_attention_heads": 4,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
CONFIGS: dict[str, PreTrainedConfig] = {
    "llama": LlamaConfig(
        **_COMMON, num_hidden_layers=2, num_key_value_heads=2, head_dim=16
    ),
    "qwen3_moe": Qwen3MoeConfig(
        **_COMMON,
        num_hidden_layers=2,
        num_key_value_heads=2,
        moe_intermediate_size=32,
        num_experts=4,
        num_experts_per_tok=2,
    ),
    "deepseek_v3": DeepseekV3Config(
        **_COMMON,
        num_hidden_layers=3,
        num_key_value_heads=4,
        first_k_dense_replace=1,
        moe_intermediate_size=32,
        n_routed_experts=4,
        num_experts_per_tok=2,
        n_shared_experts=1,
        n_group=1,
        topk_group=1,
        kv_lora_rank=48,
        q_lora_rank=32,
        qk_nope_head_dim=16,
        qk_rope_head_dim=16,
        v_head_dim=16,
    ),
}


def original(folder: Path, name: str) -> Path:
    """A checkpoint in bfloat16, `name` of `CONFIGS`."""
    torch.manual_seed(0)
    kind: Any = AutoModelForCausalLM
    model = kind.from_config(CONFIGS[name], dtype=torch.bfloat16)
    model.save_pretrained(folder)
    return folder


def quantised(
    source: Path,
    folder: Path,
    change: Callable[[str, torch.Tensor], Tensors],
    section: Mapping[str, Any],
) -> Path:
    """The checkpoint in `source`, each linear weight replaced by what `change` makes of
    its name and itself; `section` is the `quantization_config`."""
    tensors: Tensors = {}
    for name, tensor in load_file(source / SINGLE_FILE).items():
        made = change(name, tensor) if is_linear(name, tensor) else {name: tensor}
        tensors.update((key, value.contiguous()) for key, value in made.items())
    folder.mkdir(exist_ok=True)
    save_file(tensors, folder / SINGLE_FILE, {"format": "pt"})
    config = json.loads((source / "config.json").read_text())
    config["quantization_config"] = dict(section)
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def is_linear(name: str, tensor: torch.Tensor) -> bool:
    others = ("embed_tokens", "lm_head", "norm", "mlp.gate.", "router")
    is_other = any(part in name for part in others)
    return tensor.ndim == 2 and name.endswith(".weight") and not is_other


def fp8_section(blocks: tuple[int, int] | None) -> dict[str, Any]:
    return {
        "quant_method": "fp8",
        "activation_scheme": "dynamic",
        "fmt": "e4m3",
        "weight_block_size": list(blocks) if blocks else None,
    }


def fp8_of(
    weight: torch.Tensor, blocks: Sequence[int], *, powers: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """`weight` in 8-bit floats, and the scales of its blocks, in float32; `powers` of
    two if asked for."""
    rows, columns = weight.shape
    down, across = -(-rows // blocks[0]), -(-columns // blocks[1])
    padded = torch.zeros(down * blocks[0], across * blocks[1])
    padded[:rows, :columns] = weight.float()
    parts = padded.view(down, blocks[0], across, blocks[1])
    scales = parts.abs().amax((1, 3)).clamp(min=1e-12) / 448
    scales = scales.log2().ceil().exp2() if powers else scales
    numbers = (parts / scales[:, None, :, None]).view_as(padded)[:rows, :columns]
    return numbers.to(torch.float8_e4m3fn), scales


def dequantised(folder: Path, **options: Any) -> PreTrainedModel:
    """The model that transformers makes of a quantised checkpoint, dequantised."""
    section = json.loads((folder / "config.json").read_text())["quantization_config"]
    kinds = {"fp8": FineGrainedFP8Config}
    settings = kinds[section["quant_method"]](dequantize=True)
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=settings, **{"dtype": "auto", **options}
    )
    model.train(False)
    return model

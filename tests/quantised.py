"""Writes small quantised checkpoints, and has transformers dequantise them."""

from __future__ import annotations

import importlib
import json
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    CompressedTensorsConfig,
    DeepseekV3Config,
    FineGrainedFP8Config,
    GptOssConfig,
    LlamaConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen3MoeConfig,
)
from transformers.utils.quantization_config import Mxfp4Config

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
    "gpt_oss": GptOssConfig(
        **_COMMON,
        num_hidden_layers=2,
        num_key_value_heads=2,
        head_dim=16,
        num_local_experts=4,
        num_experts_per_tok=2,
        sliding_window=8,
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
    """The checkpoint in `source`, each weight of a linear layer or of stacked experts
    replaced by what `change` makes of
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
    if name.endswith(("experts.gate_up_proj", "experts.down_proj")):
        return True
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


def fp4_of(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """`weight` in 4-bit floats, two in a byte (uint8), and the exponents, plus 127, of
    the scales of 32 in a row (uint8)."""
    positive = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])
    parts = torch.unflatten(weight.float(), -1, (-1, 32))
    exponents = parts.abs().amax(-1).clamp(min=2.0**-100).log2().floor() - 2
    parts = parts / exponents.exp2()[..., None]
    codes = (parts.abs()[..., None] - positive).abs().argmin(-1).to(torch.uint8)
    codes = codes | ((parts < 0).to(torch.uint8) << 3)
    codes = torch.unflatten(codes, -1, (16, 2))
    numbers = codes[..., 0] | (codes[..., 1] << 4)
    return numbers, (exponents + 127).to(torch.uint8)


def compressed(source: Path, folder: Path, scheme_name: str) -> Path:
    """The checkpoint in `source` as compressed-tensors itself writes it."""
    library: Any = importlib.import_module("compressed_tensors.quantization")
    compressors: Any = importlib.import_module("compressed_tensors.compressors")
    formats: Any = importlib.import_module("compressed_tensors.compressors.format")
    utils: Any = importlib.import_module("compressed_tensors.quantization.utils")

    scheme = library.preset_name_to_scheme(scheme_name, targets=["Linear"])
    weights = scheme.weights
    assert weights is not None
    is_packed_float = weights.type == "float" and weights.num_bits == 4
    if weights.group_size and not is_packed_float:
        weights.group_size = 16
    if weights.block_structure:
        weights.block_structure = [16, 32]
    scheme.format = formats.infer_module_format(torch.nn.Linear, scheme)
    compressor = compressors.BaseCompressor.get_value_from_registry(scheme.format)

    def change(name: str, weight: torch.Tensor) -> Tensors:
        rows, columns = weight.shape
        down, across = weights.block_structure or (1, weights.group_size or columns)
        parts = weight.view(rows // down, down, columns // across, across)
        divisor = None
        if weights.strategy == "tensor_group":
            divisor = utils.generate_gparam(weight.amin(), weight.amax())
        scales, zeros = utils.calculate_qparams(
            parts.amin((1, 3)), parts.amax((1, 3)), weights, global_scale=divisor
        )
        state = {"weight": weight, "weight_scale": scales}
        if divisor is not None:
            state["weight_global_scale"] = divisor
        elif not is_packed_float:
            state["weight_scale"] = scales.to(weight.dtype)
        if not weights.symmetric:
            state["weight_zero_point"] = zeros
        made = compressor.compress(state, scheme)
        prefix = name.removesuffix("weight")
        return {prefix + key: torch.as_tensor(value) for key, value in made.items()}

    config = library.QuantizationConfig(
        config_groups={"group_0": scheme},
        ignore=["lm_head"],
        format=scheme.format,
        quantization_status=library.QuantizationStatus.COMPRESSED,
    )
    section = json.loads(config.model_dump_json())
    return quantised(source, folder, change, section)


def dequantised(folder: Path, **options: Any) -> PreTrainedModel:
    """The model that transformers makes of a quantised checkpoint, dequantised."""
    section = json.loads((folder / "config.json").read_text())["quantization_config"]
    kinds: dict[str, Any] = {
        "fp8": FineGrainedFP8Config,
        "mxfp4": Mxfp4Config,
        "compressed-tensors": CompressedTensorsConfig,
    }
    settings = kinds[section["quant_method"]](dequantize=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that the section gets the option above
        model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
            folder, quantization_config=settings, **{"dtype": "auto", **options}
        )
    model.train(False)
    return model

"""Checkpoints as they are stored, and policies, for tests with ranks."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from penstock.offload.convert.conversion import Conversion
from quantised import CONFIGS, fp4_of, fp8_of, fp8_section, quantised

BLOCKS = 4


def plain(name: str, folder: Path) -> Path:
    """A checkpoint in bfloat16 of a model with `BLOCKS` blocks."""
    shallow: Any = CONFIGS[name]
    values = {**shallow.to_dict(), "num_hidden_layers": BLOCKS, "vocab_size": 160}
    if kinds := values.pop("layer_types", None):
        values["layer_types"] = [kinds[n % len(kinds)] for n in range(BLOCKS)]
    torch.manual_seed(0)
    kind: Any = AutoModelForCausalLM
    model = kind.from_config(type(shallow)(**values), dtype=torch.bfloat16)
    model.save_pretrained(folder / name)
    return folder / name


def fp8(folder: Path) -> Path:
    def change(name: str, weight: torch.Tensor) -> dict[str, torch.Tensor]:
        numbers, scales = fp8_of(weight, (32, 16))
        return {name: numbers, name + "_scale_inv": scales}

    source = plain("qwen3_moe", folder)
    return quantised(source, folder / "fp8", change, fp8_section((32, 16)))


def mxfp4(folder: Path) -> Path:
    def change(name: str, weight: torch.Tensor) -> dict[str, torch.Tensor]:
        if ".experts." not in name:
            return {name: weight}
        numbers, exponents = fp4_of(weight.transpose(1, 2))
        return {f"{name}_blocks": numbers, f"{name}_scales": exponents}

    source = plain("gpt_oss", folder)
    return quantised(source, folder / "mxfp4", change, {"quant_method": "mxfp4"})


def lossless(folder: Path) -> Path:
    source, made = plain("qwen3_moe", folder), folder / "lossless"
    Conversion(source, made, "lossless", group=32, ignore="").run(lambda a, b: None)
    return made


def int4(folder: Path) -> Path:
    source, made = plain("qwen3_moe", folder), folder / "int4"
    Conversion(source, made, "int4", group=32, ignore="lm_head").run(lambda a, b: None)
    return made


KINDS: Mapping[str, Callable[[Path], Path]] = {
    "gpt_oss": lambda folder: plain("gpt_oss", folder),
    "qwen3_moe": lambda folder: plain("qwen3_moe", folder),
    "fp8": fp8,
    "mxfp4": mxfp4,
    "lossless": lossless,
    "int4": int4,
}
OWN: Sequence[Mapping[str, Any]] = (
    {"host_memory": "1GiB", "placement": {"1": "disk", "2": "host"}},
    {"weights_kept": "decoded", "lookahead": 1},
)
"""What each of two ranks has for itself."""
SHARED: Mapping[str, Mapping[str, Any]] = {
    "usual": {},
    "kv on disk": {"kv": {"tier": "disk"}},
    "kv in int8": {"kv": {"tier": "host", "dtype": "int8"}},
    "not coalesced": {"coalesce": "off", "prompt_tokens": 2},
}
"""What both have."""

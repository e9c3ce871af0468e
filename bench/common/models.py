"""Makes the models that scripts measure: Llamas with random weights."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

sys.path.append(str(Path(__file__).resolve().parents[2] / "examples"))

from checkpoint import SIZES, make_checkpoint, write_tokenizer

__all__ = [
    "SIZES",
    "converted",
    "llama",
    "make_checkpoint",
    "square",
    "write_tokenizer",
]


def llama(
    folder: Path,
    *,
    dtype: torch.dtype = torch.float32,
    max_shard_size: str = "5GB",
    **config: Any,
) -> Path:
    """Saves a Llama with this configuration to `folder`, and returns the folder. The
    weights are always the same."""
    torch.manual_seed(0)
    model: Any = LlamaForCausalLM(LlamaConfig(**config))
    model.to(dtype).save_pretrained(folder, max_shard_size=max_shard_size)
    return folder


def converted(model: Path, folder: Path, to: str, *options: str) -> Path:
    """`model` as `penstock convert --to` makes it, in `folder`, which is returned."""
    command = [sys.executable, "-c", "from penstock.offload.cli import main; main()"]
    command += ["convert", str(model), str(folder), "--to", to, *options]
    subprocess.run(command, check=True)
    return folder


def square(folder: Path, layers: int, hidden: int, **config: Any) -> Path:
    """Saves a Llama with heads of 64, as many for keys and values as for queries."""
    return llama(
        folder,
        hidden_size=hidden,
        intermediate_size=hidden * 11 // 4,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 64,
        num_key_value_heads=hidden // 64,
        **config,
    )

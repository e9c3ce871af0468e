"""Makes a small Llama with a tokenizer, the same in FP8, and texts to score."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from checkpoint import make_checkpoint
from penstock.io.checkpoint.index import SINGLE_FILE
from quantised import Tensors, fp8_of, fp8_section, quantised

BLOCKS = (16, 16)
TOKENIZER = ("tokenizer.json", "tokenizer_config.json")


def make_original(folder: Path) -> Path:
    """In float32. Its weights are large, so that it is sure of next tokens."""
    make_checkpoint(folder, "tiny", dtype="float32")
    tensors = load_file(folder / SINGLE_FILE)
    large = {n: t * 8 if t.ndim == 2 else t for n, t in tensors.items()}
    save_file(large, folder / SINGLE_FILE, {"format": "pt"})
    return folder


def make_fp8(original: Path, folder: Path) -> Path:
    def change(name: str, weight: torch.Tensor) -> Tensors:
        numbers, scales = fp8_of(weight, BLOCKS)
        return {name: numbers, f"{name}_scale_inv": scales}

    quantised(original, folder, change, fp8_section(BLOCKS))
    for name in TOKENIZER:
        shutil.copy(original / name, folder)
    return folder


def make_rows(path: Path) -> Path:
    texts = [f"def f{i}(x):\n    return x + {'very ' * i}{i}" for i in range(12)]
    lines = [{"id": f"r{i}", "text": text} for i, text in enumerate(texts)]
    lines.append({"id": "p", "prompt": "import os\nprint(", "completion": "os.path)"})
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path

"""A small Llama with a tokenizer, and the same in FP8."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from checkpoint import make_checkpoint
from penstock.io.checkpoint.index import SINGLE_FILE
from quantised import Tensors, fp8_of, fp8_section, quantised

BLOCKS = (16, 16)
TOKENIZER = ("tokenizer.json", "tokenizer_config.json")


@pytest.fixture(scope="session")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """In float32. Its weights are large, so that it is sure of next tokens."""
    folder = tmp_path_factory.mktemp("original") / "tiny"
    make_checkpoint(folder, "tiny", dtype="float32")
    tensors = load_file(folder / SINGLE_FILE)
    save_file(
        {n: t * 8 if t.ndim == 2 else t for n, t in tensors.items()},
        folder / SINGLE_FILE,
        {"format": "pt"},
    )
    return folder


@pytest.fixture(scope="session")
def fp8(original: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    def change(name: str, weight: torch.Tensor) -> Tensors:
        numbers, scales = fp8_of(weight, BLOCKS)
        return {name: numbers, f"{name}_scale_inv": scales}

    folder = tmp_path_factory.mktemp("fp8")
    quantised(original, folder, change, fp8_section(BLOCKS))
    for name in TOKENIZER:
        shutil.copy(original / name, folder)
    return folder


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    texts = [f"def f{i}(x):\n    return x + {'very ' * i}{i}" for i in range(12)]
    path = tmp_path / "texts.jsonl"
    lines = [{"id": f"r{i}", "text": text} for i, text in enumerate(texts)]
    lines.append({"id": "p", "prompt": "import os\nprint(", "completion": "os.path)"})
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path

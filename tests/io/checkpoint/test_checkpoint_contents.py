"""What a checkpoint holds, where that is not what its config says."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import penstock
from penstock import Policy
from penstock.io.errors import CheckpointChangedError, CheckpointError
from penstock.offload.model import engine_of

pytestmark = pytest.mark.usefixtures("no_leaks")

Tensors = dict[str, torch.Tensor]
POLICY = Policy(device_memory="1MiB", resident_below=1)
IDS = torch.arange(8)[None] + 3


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("llama")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        tie_word_embeddings=False,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def variant(
    saved: Path, folder: Path, change: Callable[[Tensors], Tensors], **config: Any
) -> Path:
    tensors = change(load_file(saved / "model.safetensors"))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    values = json.loads((saved / "config.json").read_text()) | config
    kept = {key: value for key, value in values.items() if value is not None}
    (folder / "config.json").write_text(json.dumps(kept))
    return folder


def logits(folder: Path) -> torch.Tensor:
    with penstock.load(folder, POLICY) as model, torch.inference_mode():
        found: torch.Tensor = model(IDS).logits
    return found


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.int8, torch.uint8])
@pytest.mark.parametrize("beside", [None, "hf_quant_config.json"])
def test_quantised_weights_without_a_config_of_theirs_are_refused(
    dtype: torch.dtype, beside: str | None, saved: Path, tmp_path: Path
) -> None:
    name = "model.layers.0.mlp.up_proj.weight"

    def quantised(tensors: Tensors) -> Tensors:
        scale = {f"{name}_scale_inv": torch.ones(1)}
        return {**tensors, **scale, name: tensors[name].to(dtype)}

    folder = variant(saved, tmp_path, quantised)
    if beside is not None:
        (folder / beside).write_text("{}")
    with pytest.raises(CheckpointError, match=rf"{name}.*quantised") as refused:
        penstock.load(folder, POLICY)
    assert (beside or "hf_quant") not in f"{refused.value}" or beside is not None


def test_tensors_that_nobody_uses_are_announced(saved: Path, tmp_path: Path) -> None:
    folder = variant(saved, tmp_path, dict, num_hidden_layers=1)
    with penstock.load(folder, POLICY) as model:
        said = penstock.statistics(model).fallbacks
    assert any("9 tensors" in s and "model.layers.1." in s for s in said)


def test_what_transformers_ignores_is_not_announced(
    saved: Path, tmp_path: Path
) -> None:
    def with_tables(tensors: Tensors) -> Tensors:
        name = "model.layers.0.self_attn.rotary_emb.inv_freq"
        return {**tensors, name: torch.rand(8)}

    folder = variant(saved, tmp_path, with_tables)
    with penstock.load(folder, POLICY) as model:
        said = penstock.statistics(model).fallbacks
    assert not any("not used" in s for s in said)


def test_without_a_dtype_in_the_config_it_is_the_one_transformers_takes(
    saved: Path, tmp_path: Path
) -> None:
    def mixed(tensors: Tensors) -> Tensors:
        return {
            name: tensor.bfloat16() if name == min(tensors) else tensor
            for name, tensor in tensors.items()
        }

    folder = variant(saved, tmp_path, mixed, dtype=None)
    whole = AutoModelForCausalLM.from_pretrained(folder, dtype="auto").train(False)
    assert whole.dtype == torch.bfloat16
    with torch.inference_mode():
        assert torch.equal(logits(folder), whole(IDS).logits)


class Words:
    """A tokenizer of numbers."""

    is_fast = False
    pad_token_id = 0
    eos_token_id = None

    def __call__(self, text: str, **options: Any) -> dict[str, list[int]]:
        return {"input_ids": [int(word) for word in text.split()]}


def test_a_checkpoint_without_a_head_embeds_and_does_nothing_else(
    saved: Path, tmp_path: Path
) -> None:
    def headless(tensors: Tensors) -> Tensors:
        return {name: t for name, t in tensors.items() if name != "lm_head.weight"}

    folder = variant(saved, tmp_path, headless)
    rows = [{"id": 1, "text": "3 4 5 6"}]
    with penstock.load(saved, POLICY) as whole:
        expected = list(penstock.embed(whole, rows, tokenizer=Words()))
    with penstock.load(folder, POLICY) as model:
        said = penstock.statistics(model).fallbacks
        assert any("lacks lm_head.weight: it can only embed" in s for s in said)
        assert list(penstock.embed(model, rows, tokenizer=Words())) == expected
        with pytest.raises(CheckpointError, match=r"lm_head\.weight.*only embed"):
            list(penstock.score(model, rows, tokenizer=Words()))
        with pytest.raises(CheckpointError, match=r"lm_head\.weight.*only embed"):
            list(penstock.generate(model, rows, tokenizer=Words(), max_new_tokens=2))
        with pytest.raises(CheckpointError, match=r"lm_head\.weight"):
            model(IDS)


def test_other_tensors_that_are_missing_are_an_error(
    saved: Path, tmp_path: Path
) -> None:
    def incomplete(tensors: Tensors) -> Tensors:
        return {name: t for name, t in tensors.items() if "norm" not in name}

    with pytest.raises(CheckpointError, match="lacks"):
        penstock.load(variant(saved, tmp_path, incomplete), POLICY)


def test_weights_that_change_in_place_are_noticed_though_size_and_mtime_stay(
    saved: Path, tmp_path: Path
) -> None:
    import os

    folder = variant(saved, tmp_path, dict)
    path = folder / "model.safetensors"
    policy = Policy(device_memory=48 << 10, resident_below=1)
    with penstock.load(folder, policy) as model, torch.inference_mode():
        model(IDS)
        before = path.stat()
        with path.open("r+b") as file:
            file.seek(-4, os.SEEK_END)
            file.write(b"\0\0\0\0")
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
        with pytest.raises(CheckpointChangedError, match=r"model\.safetensors"):
            model(IDS)


def test_a_file_that_loses_its_name_is_still_the_same(
    saved: Path, tmp_path: Path
) -> None:
    expected = logits(saved)
    folder = variant(saved, tmp_path, dict)
    policy = Policy(device_memory=48 << 10, resident_below=1)
    with penstock.load(folder, policy) as model, torch.inference_mode():
        model(IDS)
        (folder / "model.safetensors").unlink()
        assert torch.equal(model(IDS).logits, expected)


def test_tasks_take_the_device_from_who_computes(saved: Path) -> None:
    with penstock.load(saved, POLICY) as model:
        assert engine_of(model).device == torch.device("cpu")

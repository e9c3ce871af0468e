"""What cannot be compared is refused in one sentence, which says what to do."""

from __future__ import annotations

import contextlib
import io
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from changed_models import TOKENIZER, make_fp8, make_original, make_rows
from safetensors.torch import load_file, save_file

import quantised
import zoo
from penstock.io.checkpoint.index import SINGLE_FILE
from penstock.offload.cli import main

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("no_leaks")]


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_original(tmp_path_factory.mktemp("original") / "tiny")


@pytest.fixture(scope="module")
def fp8(original: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_fp8(original, tmp_path_factory.mktemp("fp8"))


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    return make_rows(tmp_path / "texts.jsonl")


def verify(*arguments: Any) -> tuple[int, str, str]:
    """The exit code of `penstock verify`, in this process, and what it says."""
    out, err = io.StringIO(), io.StringIO()
    code: Any = 0
    with (
        pytest.MonkeyPatch.context() as patch,
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
    ):
        patch.setattr(sys, "argv", ["penstock", "verify", *map(str, arguments)])
        patch.setenv("COLUMNS", "400")
        try:
            main()
        except SystemExit as end:
            code = end.code or 0
    return code, out.getvalue(), err.getvalue()


def refused(*arguments: Any) -> str:
    """The one sentence of a command that fails for bad usage."""
    code, out, err = verify(*arguments)
    assert code == 2, (out, err)
    assert out == ""
    lines = [line for line in err.splitlines() if "error: " in line]
    assert len(lines) == 1, err
    assert "Traceback" not in err
    return lines[0]


def copied(source: Path, folder: Path, **config: Any) -> Path:
    shutil.copytree(source, folder)
    values = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**values, **config}))
    return folder


def test_another_architecture(original: Path, tmp_path: Path) -> None:
    other = quantised.original(tmp_path / "moe", "qwen3_moe")
    said = refused(other, "--against", original)
    assert f"{other} is a Qwen3MoeForCausalLM and {original} is a Llama" in said
    assert f"take as ORIGINAL the checkpoint that {other} was made from" in said


def test_other_shapes(original: Path, tmp_path: Path) -> None:
    other = quantised.original(tmp_path / "small", "llama")
    said = refused(other, "--against", original)
    assert "'model.embed_tokens.weight' is [96, 64] in " in said
    assert "and [600, 64] in " in said
    assert "take as ORIGINAL" in said


def test_a_layer_more(original: Path, tmp_path: Path) -> None:
    fewer = copied(original, tmp_path / "fewer", num_hidden_layers=3)
    said = refused(fewer, "--against", original)
    assert f"{original} has the weight 'model.layers.3." in said
    assert f"{fewer} has not" in said


@pytest.mark.parametrize("swapped", [False, True])
def test_a_folder_that_is_not_there(original: Path, swapped: bool) -> None:
    pair = [original, "nowhere"]
    model, other = reversed(pair) if swapped else pair
    assert "nowhere" in refused(model, "--against", other)


def test_a_tensor_that_is_missing(original: Path, tmp_path: Path) -> None:
    other = copied(original, tmp_path / "lacking")
    tensors = load_file(other / SINGLE_FILE)
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, other / SINGLE_FILE, {"format": "pt"})
    said = refused(other, "--against", original)
    assert "model.layers.1.mlp.up_proj.weight" in said


def test_another_tokenizer(
    original: Path, fp8: Path, rows: Path, tmp_path: Path
) -> None:
    other = copied(original, tmp_path / "other")
    path = other / "tokenizer.json"
    values = json.loads(path.read_text())
    vocabulary = values["model"]["vocab"]
    names = sorted(vocabulary, key=vocabulary.__getitem__)[-2:]
    vocabulary |= {names[0]: vocabulary[names[1]], names[1]: vocabulary[names[0]]}
    path.write_text(json.dumps(values))
    said = refused(other, "--against", original, rows)
    assert "the tokenizers differ" in said
    assert f"copy the tokenizer's files of {original} to {other}" in said
    assert verify(other, "--against", original)[0] == 0, "weights can be compared"


def test_tokens_that_differ_in_one_row(
    original: Path, rows: Path, tmp_path: Path
) -> None:
    """The vocabulary is the same, what is done with it is not."""
    other = copied(original, tmp_path / "other")
    path = other / "tokenizer.json"
    values = json.loads(path.read_text())
    values["post_processor"] = None
    path.write_text(json.dumps(values))
    said = refused(other, "--against", original, rows)
    assert "row 'r0' has other tokens in" in said
    assert "copy the tokenizer's files" in said


def test_no_tokenizer(original: Path, rows: Path, tmp_path: Path) -> None:
    other = copied(original, tmp_path / "other")
    for name in TOKENIZER:
        (other / name).unlink()
    said = refused(other, "--against", original, rows)
    assert f"no tokenizer can be loaded from {other}" in said


def test_an_encoder_has_no_perplexity(rows: Path, tmp_path: Path) -> None:
    zoo.save_checkpoint("bert", tmp_path)
    said = refused(tmp_path, "--against", tmp_path, rows)
    assert "is no causal language model" in said


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["texts.jsonl"], "ROWS: only with --against ORIGINAL"),
        (["-o", "x.json"], "--output: only with --against ORIGINAL"),
        (["--report", "x"], "--report: only with --against ORIGINAL"),
        (["--window", "8"], "--window: only with --against ORIGINAL"),
        (["--against", "x", "--checksums"], "leave --against out"),
        (["--against", "x", "--window", "8"], "--window: only with ROWS"),
        (["--against", "x", "-"], "put them into a file"),
        (["--against", "x", "none.jsonl"], "none.jsonl"),
    ],
)
def test_options_that_do_not_go_together(
    original: Path, options: list[str], words: str
) -> None:
    assert words in refused(original, *options)


def test_an_adapter(original: Path) -> None:
    said = refused(original, "--against", original, "--set", 'adapter="lora"')
    assert "take adapter (lora) out of the policy" in said


def test_an_output_that_is_the_input(original: Path, rows: Path) -> None:
    before = rows.read_text()
    refused(original, "--against", original, rows, "-o", rows)
    assert rows.read_text() == before


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Path]:
    def made(*lines: dict[str, Any]) -> Path:
        path = tmp_path / "some.jsonl"
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))
        return path

    return made


def test_rows_that_fail_are_left_out_and_told(
    original: Path, fp8: Path, write: Callable[..., Path], tmp_path: Path
) -> None:
    path = write(
        {"id": "good", "text": "Call me Ishmael."},
        {"id": "bad", "text": "x", "logit_bias": {"3": 1}},
        {"id": "long", "text": "many words " * 3000},
        {"id": "fine", "text": "It was the best of times."},
    )
    out = tmp_path / "found.json"
    code, said, _ = verify(fp8, "--against", original, path, "-o", out)
    assert code == 1
    assert "left out: 2 of 4 rows failed, the first: row 'bad': " in said
    found = json.loads(out.read_text())["texts"]
    assert (found["rows"], found["rows_failed"]) == (2, 2)


def test_no_row_that_can_be_scored(
    original: Path, fp8: Path, write: Callable[..., Path]
) -> None:
    path = write({"id": "bad", "text": ""})
    said = refused(fp8, "--against", original, path)
    assert "there is no row that both models can score: row 'bad': the text has" in said
    path.write_text("")
    said = refused(fp8, "--against", original, path)
    assert "some.jsonl is empty" in said


def test_weights_that_are_no_numbers_are_told(original: Path, tmp_path: Path) -> None:
    other = copied(original, tmp_path / "broken")
    tensors = load_file(other / SINGLE_FILE)
    tensors["lm_head.weight"][3, 5] = torch.nan
    save_file(tensors, other / SINGLE_FILE, {"format": "pt"})
    out = tmp_path / "found.json"
    code, said, _ = verify(other, "--against", original, "-o", out)
    assert code == 0
    assert "relative error no number" in said
    unit = json.loads(out.read_text())["units"][-1]
    assert (unit["unit"], unit["relative_error"]) == ("lm_head", None)
    assert not unit["is_identical"]


def test_a_config_of_another_model_is_told(original: Path, tmp_path: Path) -> None:
    """Weights fit, and are the same; what is computed with them is not."""
    rope = {"rope_type": "default", "rope_theta": 5e5}
    changed = {"rms_norm_eps": 0.5, "rope_parameters": rope}
    other = copied(original, tmp_path / "other", **changed)
    code, said, err = verify(other, "--against", original)
    assert code == 0
    assert "weights: identical" in said
    assert "config.json differs from the original's: rms_norm_eps is 0.5, not" in err
    assert "rope_parameters.rope_theta is 500000.0, not 10000.0" in err
    code, _, err = verify(original, "--against", original)
    assert code == 0
    assert "differs" not in err


def test_ctrl_c_is_said(original: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*arguments: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("penstock.offload.quality.comparison.open_pair", interrupted)
    code, said, err = verify(original, "--against", original)
    assert (code, said) == (130, "")
    assert "interrupted: nothing was written" in err

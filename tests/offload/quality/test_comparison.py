"""A checkpoint against its original: what is measured is what transformers finds."""

from __future__ import annotations

import json
import math
import shutil
import weakref
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from changed_models import make_fp8, make_original, make_rows
from rich.console import Console
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

import quantised
from penstock import Policy
from penstock.io.checkpoint.index import SINGLE_FILE
from penstock.io.errors import OutputError
from penstock.offload.cli import app
from penstock.offload.files.inputs import Inputs
from penstock.offload.files.json_rows import SCORED_KEYS
from penstock.offload.files.sources import Own, find_files
from penstock.offload.quality import pair as pair_module
from penstock.offload.quality import texts as texts_module
from penstock.offload.quality.comparison import Comparison, compare
from penstock.offload.quality.score_file import ScoreFile
from penstock.offload.quality.stages import Stages
from penstock.offload.quality.texts import Texts
from penstock.offload.quality.token_scores import TokenScores

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("no_leaks")]

POLICY = Policy(dtype="float32", device_memory="400KiB", micro_batch_tokens=64)


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_original(tmp_path_factory.mktemp("original") / "tiny")


@pytest.fixture(scope="module")
def fp8(original: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_fp8(original, tmp_path_factory.mktemp("fp8"))


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    return make_rows(tmp_path / "texts.jsonl")


def compared(
    model: Path,
    original: Path,
    rows: Path | None = None,
    policy: Policy = POLICY,
    window: int | None = None,
) -> Comparison:
    texts = None
    if rows is not None:
        texts = Texts(Inputs(find_files([rows], Own()), SCORED_KEYS), window)
    return compare(model, original, policy, texts, Stages(Console(quiet=True)))


def changed(
    source: Path, folder: Path, change: Callable[[str, torch.Tensor], torch.Tensor]
) -> Path:
    """A copy of the checkpoint `source` whose tensors `change` has made."""
    shutil.copytree(source, folder)
    tensors = load_file(source / SINGLE_FILE)
    made = {name: change(name, tensor) for name, tensor in tensors.items()}
    save_file(made, folder / SINGLE_FILE, {"format": "pt"})
    return folder


def resident(model: Any, folder: Path, rows: Path) -> tuple[float, list[int]]:
    """The perplexity of the texts, computed by transformers, and what is most probable
    at each place."""
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    logs: list[float] = []
    tops: list[int] = []
    for line in rows.read_text().splitlines():
        row = json.loads(line)
        text = row.get("text") or row["prompt"] + row["completion"]
        ids = torch.tensor([tokenizer(text)["input_ids"]])
        first = len(tokenizer(row["prompt"])["input_ids"]) if "prompt" in row else 1
        with torch.inference_mode():
            logits = model(input_ids=ids).logits[0, first - 1 : -1]
        found = logits.log_softmax(-1).gather(1, ids[0, first:, None])
        logs += found[:, 0].tolist()
        tops += logits.argmax(-1).tolist()
    return math.exp(-math.fsum(logs) / len(logs)), tops


def test_equal_models_are_identical(original: Path, rows: Path) -> None:
    found = compared(original, original, rows)
    assert found.total.is_identical
    assert found.num_identical == found.num_tensors == 39
    assert [unit.total.name for unit in found.units] == [
        "model.embed_tokens",
        *(f"model.layers.{i}" for i in range(4)),
        "model.norm",
        "lm_head",
    ]
    assert found.texts is not None
    assert found.texts.is_identical
    assert found.texts.difference == 0.0
    assert found.texts.standard_error == 0.0
    assert found.texts.agreement == 1.0


def test_a_known_perturbation_has_the_known_error_in_its_unit_only(
    original: Path, tmp_path: Path
) -> None:
    name = "model.layers.2.mlp.up_proj.weight"
    scaled = changed(
        original, tmp_path / "m", lambda n, t: t * (1.25 if n == name else 1)
    )
    found = compared(scaled, original)
    assert found.texts is None
    differing = [unit for unit in found.units if not unit.total.is_identical]
    assert [unit.total.name for unit in differing] == ["model.layers.2"]
    worst = differing[0].worst
    assert worst is not None
    assert worst.name == name
    assert worst.relative == pytest.approx(0.25)
    most = float(load_file(original / SINGLE_FILE)[name].abs().max())
    assert worst.largest == pytest.approx(0.25 * most)
    assert differing[0].num_identical == differing[0].num_tensors - 1
    assert found.num_tensors - found.num_identical == 1


def test_perplexities_and_next_tokens_are_those_of_transformers(
    original: Path, fp8: Path, rows: Path
) -> None:
    found = compared(fp8, original, rows)
    texts = found.texts
    assert texts is not None
    kind: Any = AutoModelForCausalLM
    of_original = resident(kind.from_pretrained(original), original, rows)
    of_model = resident(quantised.dequantised(fp8, dtype=torch.float32), original, rows)
    assert texts.tokens == len(of_model[1])
    assert texts.rows == 13
    assert texts.original_perplexity == pytest.approx(of_original[0], rel=1e-5)
    assert texts.perplexity == pytest.approx(of_model[0], rel=1e-5)
    wanted = of_model[0] / of_original[0] - 1
    assert texts.difference == pytest.approx(wanted, abs=1e-5)
    same = sum(a == b for a, b in zip(of_model[1], of_original[1], strict=True))
    assert texts.num_same_top == same
    assert 0 < same < texts.tokens, "the texts tell the models apart"
    assert not texts.is_identical


def test_the_error_of_fp8_is_that_of_what_transformers_makes_of_it(
    original: Path, fp8: Path
) -> None:
    found = compared(fp8, original)
    weights = quantised.dequantised(fp8, dtype=torch.float32).state_dict()
    for name, tensor in load_file(original / SINGLE_FILE).items():
        if not torch.equal(weights[name], tensor):
            unit = next(u for u in found.units if name.startswith(f"{u.total.name}."))
            error = (weights[name] - tensor).double().norm() / tensor.double().norm()
            assert unit.worst is not None
            assert unit.worst.relative is not None
            assert float(error) <= unit.worst.relative * 1.0001
            assert 0.01 < float(error) < 0.04  # three bits of mantissa
    assert found.stored_bytes < 0.6 * found.original_bytes


def test_stacked_experts_are_compared_too(tmp_path: Path) -> None:
    source = quantised.original(tmp_path / "moe", "qwen3_moe")
    found = compared(source, source, policy=Policy())
    assert found.total.is_identical
    assert found.dtype == "bfloat16"
    assert [u.total.name for u in found.units][1] == "model.layers.0"


def test_a_head_that_is_untied_in_one_is_compared_with_the_embeddings(
    tmp_path: Path,
) -> None:
    source = quantised.original(tmp_path / "a", "llama")
    config = json.loads((source / "config.json").read_text())
    for name, is_tied in (("tied", True), ("untied", False)):
        shutil.copytree(source, tmp_path / name)
        tensors = load_file(source / SINGLE_FILE)
        head = tensors.pop("lm_head.weight")
        if not is_tied:
            tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
            assert head.shape == tensors["lm_head.weight"].shape
        save_file(tensors, tmp_path / name / SINGLE_FILE, {"format": "pt"})
        text = json.dumps({**config, "tie_word_embeddings": is_tied})
        (tmp_path / name / "config.json").write_text(text)
    found = compared(tmp_path / "untied", tmp_path / "tied", policy=Policy())
    assert found.total.is_identical
    assert any("tie_word_embeddings" in note for note in found.notes)


def test_one_tensor_of_each_is_in_memory_at_a_time(
    original: Path, fp8: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    alive: list[weakref.ref[torch.Tensor]] = []
    most = 0

    def counted(recipe: Any) -> torch.Tensor:
        nonlocal most
        tensor: torch.Tensor = real(recipe)
        alive.append(weakref.ref(tensor))
        most = max(most, sum(ref() is not None for ref in alive))
        return tensor

    real = vars(pair_module)["assembled"]
    monkeypatch.setattr(pair_module, "assembled", counted)
    compared(fp8, original)
    assert len(alive) == 2 * 39
    assert most == 2


def test_one_model_is_loaded_at_a_time(
    original: Path, fp8: Path, rows: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[str] = []

    @contextmanager
    def recorded(use: Any, path: Path, policy: Policy) -> Any:
        events.append(f"open {path.name}")
        with real(use, path, policy) as model:
            yield model
        events.append(f"close {path.name}")

    real = vars(texts_module)["load_for"]
    monkeypatch.setattr(texts_module, "load_for", recorded)
    compared(fp8, original, rows)
    one, other = original.name, fp8.name
    assert events == [f"open {one}", f"close {one}", f"open {other}", f"close {other}"]


def test_logits_are_never_whole_and_results_do_not_depend_on_it(
    original: Path, fp8: Path, rows: Path
) -> None:
    narrow = POLICY.model_copy(update={"logits_memory": 12 * 600 * 4})
    found = [compared(fp8, original, rows, policy) for policy in (POLICY, narrow)]
    one, other = (each.texts for each in found)
    assert one is not None
    assert other is not None
    assert one.num_same_top == other.num_same_top
    assert one.perplexity == pytest.approx(other.perplexity, rel=1e-6)


def test_long_texts_are_scored_in_windows(
    original: Path, fp8: Path, tmp_path: Path
) -> None:
    path = tmp_path / "long.jsonl"
    path.write_text(json.dumps({"id": 1, "text": "a long text and more " * 20}) + "\n")
    texts = compared(fp8, original, path, window=16).texts
    assert texts is not None
    tokenizer: Any = AutoTokenizer.from_pretrained(original)
    ids = tokenizer("a long text and more " * 20)["input_ids"]
    assert texts.tokens == len(ids) - 1


def test_scores_come_back_from_their_file(tmp_path: Path) -> None:
    logprobs = torch.tensor([-1.5, -math.inf, 0.0])
    scores = TokenScores(logprobs, torch.tensor([5, 6, 7], dtype=torch.int32), 2**62)
    with ScoreFile(tmp_path / "cache") as file:
        file.put(scores)
        file.put(None)
        file.put(scores)
        first, none, last = file.rows()
    assert none is None
    for found in (first, last):
        assert found is not None
        assert torch.equal(found.logprobs, logprobs)
        assert found.tops.tolist() == [5, 6, 7]
        assert found.ids_digest == 2**62
    assert list((tmp_path / "cache").iterdir()) == []
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match=r"set io\.cache to a folder"):
        ScoreFile(tmp_path / "file")


def test_the_command_writes_what_it_found(
    original: Path, fp8: Path, rows: Path, tmp_path: Path
) -> None:
    out, report = tmp_path / "found.json", tmp_path / "report"
    options = ["--set", "dtype=float32", "-o", str(out), "--report", str(report)]
    command = ["verify", str(fp8), "--against", str(original), str(rows), *options]
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 0, done.output
    found = json.loads(out.read_text())
    figures = json.loads((report / "quality.json").read_text())
    assert figures["units"] == found["units"]
    assert found["texts"]["rows"] == 13
    assert found["weights"]["num_tensors"] == 39
    assert "28 of 39 tensors differ" in done.output
    assert (
        f"perplexity: {found['texts']['perplexity']:.4f}, the original's" in done.output
    )
    assert "top-1 agreement" in done.output
    assert "model.layers.3" in (report / "quality.html").read_text()

"""Labels: each as likely as `score` says, and a prompt run once for all of them."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from test_score import read, run, settings

import penstock
import zoo
from checkpoint import make_checkpoint
from common.id_tokenizer import Numbers
from penstock import Policy
from penstock.io.errors import UsageError

pytestmark = pytest.mark.usefixtures("no_leaks")

LABELS = [" yes", " no", " it goes on and on", " it ends"]
PROMPTS = [
    "The quick brown fox jumps over the lazy dog. True?",
    "Two words:",
    "import os\nprint(",
    "Zwölf Boxkämpfer jagen Viktor quer über den Sylter Deich. Wirklich?",
]
ROWS = [{"id": n, "prompt": text} for n, text in enumerate(PROMPTS)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models") / "tiny"
    return make_checkpoint(path, "tiny", dtype="float32", shards_of="100KB")


def policy(**values: Any) -> Policy:
    return Policy(device_memory="220KiB", gather_rows=1000, resident_below=10, **values)


def classified(
    folder: Path, rows: Any = ROWS, labels: Any = LABELS, **options: Any
) -> list[dict[str, Any]]:
    with penstock.load(folder, policy(**options.pop("policy", {}))) as model:
        return list(penstock.classify(model, rows, labels=labels, **options))


def scored(folder: Path, prompt: str, labels: Any = LABELS) -> list[float]:
    rows = [{"prompt": prompt, "completion": label} for label in labels]
    with penstock.load(folder, policy()) as model:
        return [row["logprob"] for row in penstock.score(model, rows)]


@pytest.mark.parametrize("tokens", [40, 512])
def test_labels_are_as_likely_as_when_scored_alone(tokens: int, folder: Path) -> None:
    found = classified(folder, policy={"micro_batch_tokens": tokens})
    assert [row["id"] for row in found] == [0, 1, 2, 3]
    for prompt, row in zip(PROMPTS, found, strict=True):
        expected = scored(folder, prompt)
        assert list(row["logprobs"]) == LABELS
        assert list(row["logprobs"].values()) == pytest.approx(expected, abs=1e-4)
        best = max(range(4), key=lambda n: expected[n])
        assert row["label"] == LABELS[best]
        whole = math.fsum(map(math.exp, expected))
        shares = [math.exp(value) / whole for value in expected]
        assert list(row["probabilities"].values()) == pytest.approx(shares, abs=1e-4)
        assert math.fsum(row["probabilities"].values()) == pytest.approx(1)


def test_a_row_may_have_labels_of_its_own(folder: Path) -> None:
    rows = [{**ROWS[0], "labels": [" a", " b b b"]}, ROWS[1]]
    own, other = classified(folder, rows)
    assert list(own["logprobs"]) == [" a", " b b b"]
    expected = scored(folder, PROMPTS[0], [" a", " b b b"])
    assert list(own["logprobs"].values()) == pytest.approx(expected, abs=1e-4)
    assert list(other["logprobs"]) == LABELS


def test_a_prompt_is_run_once_for_all_of_its_labels(folder: Path) -> None:
    """Labels of one token each need no second pass."""
    labels = ["!", "?", ".", ","]
    num_tokens = []

    def count(block: Any, arguments: tuple[torch.Tensor, ...]) -> None:
        num_tokens.append(arguments[0].shape[0] * arguments[0].shape[1])

    with penstock.load(folder, policy()) as model:
        model.model.layers[0].register_forward_pre_hook(count)
        (row,) = penstock.classify(model, ROWS[:1], labels=labels)
        assert penstock.statistics(model).passes == 1
        (prompt,) = num_tokens
        assert row["tokens"] == prompt + len(labels)
        num_tokens.clear()
        list(penstock.classify(model, ROWS[:1], labels=LABELS))
        assert num_tokens[0] <= prompt
        assert len(num_tokens) == 2, "and one pass for what labels have of their own"


NAMES = ["gpt2", "bloom", "mistral", "gemma3_text", "mixtral", "opt", "mamba", "jamba"]


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [
        name if name in NAMES else pytest.param(name, marks=pytest.mark.whole)
        for name in zoo.names(generates=True)
        if zoo.ARCHITECTURES[name].kind == "causal" and name != "rwkv_rescaled"
    ],
)
def test_every_model_finds_labels_as_likely_as_when_scored(
    name: str, tmp_path: Path
) -> None:
    """Some models share a prompt between labels, others run it again. The windows of
    some are shorter than the prompt."""
    zoo.save_checkpoint(name, tmp_path)
    ids = zoo.inputs(name, rows=1, tokens=23)["input_ids"][0].tolist()
    prompts = [ids[:20], ids[3:11]]
    labels = [" 7", " 8 9 5", " 6 6"]
    rows = [{"prompt": " ".join(map(str, prompt))} for prompt in prompts]
    tight = Policy(device_memory="1MiB", resident_below=1)
    with penstock.load(tmp_path, tight) as model:
        found = list(penstock.classify(model, rows, labels=labels, tokenizer=Numbers()))
        for row, result in zip(rows, found, strict=True):
            pairs = [{**row, "completion": label} for label in labels]
            scores = list(penstock.score(model, pairs, tokenizer=Numbers()))
            expected = [score["logprob"] for score in scores]
            values = list(result["logprobs"].values())
            assert values == pytest.approx(expected, abs=2e-4)


def test_bad_rows_are_errors_of_their_own(folder: Path) -> None:
    rows = [
        {"id": 1},
        {"id": 2, "prompt": "a", "labels": ["one"]},
        {"id": 3, "prompt": "a", "labels": [1, 2]},
        {"id": 4, "prompt": "word " * 3_000},
        {"id": 5, "prompt": ""},
        ROWS[0],
    ]
    found = classified(folder, rows)
    assert "'text' is missing" in found[0]["error"]
    assert "two or more" in found[1]["error"]
    assert "different strings" in found[2]["error"]
    assert "the model's context is" in found[3]["error"]
    assert found[5]["label"] in LABELS
    (bare,) = classified(folder, ROWS[:1], labels=[])
    assert "two or more" in bare["error"]


def test_a_label_that_is_given_twice_is_a_mistake(folder: Path) -> None:
    with pytest.raises(UsageError, match="twice"):
        classified(folder, labels=[" a", " a"])


def test_the_command_writes_labels(folder: Path, tmp_path: Path) -> None:
    source, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    words = [part for label in LABELS for part in ("--label", label)]
    done = run("classify", folder, source, "-o", out, *words, *settings())
    assert done.returncode == 0, done.stderr
    assert read(out) == classified(folder)

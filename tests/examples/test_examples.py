"""The examples, run as a user runs them, on a tiny checkpoint."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import conftest
import forked_python
import penstock
from checkpoint import make_checkpoint

EXAMPLES = Path(penstock.__file__).parent / "examples"
TEXTS = EXAMPLES / "texts.jsonl"
SETTINGS = ("dtype=float32", "device_memory=512KiB")

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("own_processes")]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("models") / "tiny", "tiny")


def run(name: str, *arguments: object) -> str:
    """What the example prints; it must not fail."""
    done = forked_python.run(EXAMPLES / name, *arguments)
    assert done.returncode == 0, done.stderr
    return done.stdout


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def first_texts(folder: Path, num: int) -> Path:
    """A file with the first rows of the texts that lie beside the examples."""
    path = folder / "texts.jsonl"
    path.write_text("".join(TEXTS.read_text().splitlines(keepends=True)[:num]))
    return path


def test_a_file_is_scored(model: Path, tmp_path: Path) -> None:
    texts, scores = first_texts(tmp_path, 6), tmp_path / "scores.jsonl"
    said = run("score_file.py", model, texts, scores, *SETTINGS)
    assert re.search(r"over 1\.0 MiB of weights, at most 0\.[1-5] MiB in memory", said)
    assert [row["id"] for row in read(scores)] == [row["id"] for row in read(texts)]
    with penstock.load(model, {"dtype": "float32"}) as loaded:
        assert read(scores) == list(penstock.score(loaded, read(texts)))


def test_what_is_wrong_is_one_sentence(model: Path, tmp_path: Path) -> None:
    texts = first_texts(tmp_path, 1)
    for words, expected in (
        ([model, texts], "usage: score_file.py MODEL ROWS SCORES"),
        ([tmp_path, texts, tmp_path / "out"], "no model.safetensors"),
        ([model, texts, tmp_path / "out", "dtype=float31"], "float31"),
        ([model, tmp_path / "none.jsonl", tmp_path / "out"], "none.jsonl"),
    ):
        done = forked_python.run(EXAMPLES / "score_file.py", *words)
        assert done.returncode == 1
        assert expected in done.stderr
        assert "Traceback" not in done.stderr


def test_chats_are_completed_each_as_it_asks(model: Path, tmp_path: Path) -> None:
    answers = tmp_path / "answers.jsonl"
    said = run(
        *("complete_chats.py", model, EXAMPLES / "chats.jsonl", answers),
        *("--max-new-tokens", 6, "--set", *SETTINGS),
    )
    assert "(0 rows with errors)" in said
    found = {row["id"]: row for row in read(answers)}
    assert list(found) == [row["id"] for row in read(EXAMPLES / "chats.jsonl")]
    assert found["short"]["tokens"] <= 4
    assert len(found["several"]["completions"]) == 2
    assert all(
        row["finish_reason"] in ("stop", "length")
        for name, row in found.items()
        if name != "several"
    )


def test_a_corpus_is_embedded_and_searched(model: Path, tmp_path: Path) -> None:
    vectors = tmp_path / "vectors.npz"
    texts = first_texts(tmp_path, 5)
    query = read(texts)[3]
    said = run(
        *("embed_corpus.py", model, texts, vectors, "--query", query["text"]),
        *("--set", *SETTINGS),
    )
    found = np.load(vectors)
    assert found["vectors"].shape == (5, 64)
    assert np.allclose(np.linalg.norm(found["vectors"], axis=1), 1, atol=1e-5)
    assert list(found["ids"]) == [row["id"] for row in read(texts)]
    assert said.splitlines()[1] == f"1.000  {query['id']}", "it is its own neighbour"


def test_a_module_is_wrapped_and_computes_the_same() -> None:
    said = run(
        *("wrap_module.py", "--layers", 4, "--width", 128, "--latents", 3),
        *("--steps", 2, "--device-memory", "2MiB"),
    )
    has_diffusers = importlib.util.find_spec("diffusers") is not None
    assert ("diffusers is not installed" in said) is not has_diffusers
    assert "3 latents, 2 steps: 2 passes over" in said
    assert said.endswith("bit for bit: yes\n")


RECORDER = """#!/bin/sh
for word; do printf '%s\\n' "$word"; done >> "$RECORD"
echo ';' >> "$RECORD"
for word; do [ "$last" = -o ] && : > "$word"; last=$word; done
true
"""
"""A command `penstock` that writes down how it was called, and makes its output."""


def commands_of_tune(folder: Path, model: Path, texts: Path) -> list[list[str]]:
    """The commands that tune.sh gives, which has `folder` for its output."""
    tools, record = folder / "bin", folder / "record"
    tools.mkdir(exist_ok=True)
    (tools / "penstock").write_text(RECORDER)
    (tools / "penstock").chmod(0o755)
    record.unlink(missing_ok=True)
    subprocess.run(
        ["sh", EXAMPLES / "tune.sh", model, texts, folder / "out"],
        env={
            **os.environ,
            "PATH": f"{tools}{os.pathsep}{os.environ['PATH']}",
            "RECORD": str(record),
            "last": "",
        },
        check=True,
    )
    blocks = record.read_text().split(";\n")[:-1]
    return [block.splitlines() for block in blocks]


def test_tune_measures_once_and_goes_on(model: Path, tmp_path: Path) -> None:
    commands = commands_of_tune(tmp_path, model, TEXTS)
    assert [words[0] for words in commands] == ["machine", "plan", "tune", "score"]
    commands = commands_of_tune(tmp_path, model, TEXTS)
    assert [words[0] for words in commands] == ["plan", "score"], "both files are there"


def test_the_commands_of_tune_run(model: Path, tmp_path: Path) -> None:
    texts, out = first_texts(tmp_path, 4), tmp_path / "out"
    machine, plan, tune, score = commands_of_tune(tmp_path, model, texts)
    assert machine == ["machine", "--disk", str(model), "-o", f"{out}/machine.yaml"]
    (out / "machine.yaml").write_text(conftest.MACHINE)  # measuring takes a minute
    (out / "tuned.yaml").unlink()
    (out / "scores.jsonl").unlink()
    for words in (plan, tune, score):
        done = forked_python.run(*forked_python.COMMAND, *words)
        assert done.returncode == 0, done.stderr
    assert [row["id"] for row in read(out / "scores.jsonl")] == [
        row["id"] for row in read(texts)
    ]
    assert (out / "report" / "report.html").exists()


def test_tune_says_how_it_is_used() -> None:
    done = subprocess.run(
        ["sh", EXAMPLES / "tune.sh"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert done.stderr.startswith("usage: sh ")

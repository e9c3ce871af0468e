"""Scoring a file: right numbers, in order, whatever the rows."""

from __future__ import annotations

import contextlib
import io
import json
import math
import resource
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import forked_python
import penstock
import zoo
from checkpoint import make_checkpoint
from penstock import Policy
from penstock.io.errors import UsageError
from penstock.offload.cli import main

TIGHT = ("device_memory=220KiB", "gather_rows=1000", "resident_below=10")
ROWS: list[dict[str, Any]] = [
    {"id": "a", "text": "The quick brown fox jumps over the lazy dog."},
    {"id": "b", "prompt": "import os\nprint(", "completion": "os.getcwd())"},
    {"id": 3, "text": "Two words"},
    {"id": "d", "prompt": "A sentence that goes on", "completion": " and on and on."},
    {"id": "e", "text": "Zwölf Boxkämpfer jagen Viktor quer über den Sylter Deich."},
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small Llama in the float32 of its config, with a byte-level tokenizer."""
    path = tmp_path_factory.mktemp("models") / "tiny"
    return make_checkpoint(path, "tiny", dtype="float32", shards_of="100KB")


@pytest.fixture(scope="module")
def resident(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder).train(False)


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Path]:
    def rows(*lines: Any) -> Path:
        path = tmp_path / "in.jsonl"
        text = [x if isinstance(x, str) else json.dumps(x) for x in lines]
        path.write_text("\n".join(text) + "\n", encoding="utf-8")
        return path

    return rows


REPORT_KEYS = [
    "tokens",
    "seconds",
    "tokens_per_second",
    "passes",
    "bytes_read",
    "wait_seconds",
    "compute_seconds",
    "peak_device_bytes",
    "peak_host_bytes",
    "plan",
    "fallbacks",
]


def run(*arguments: Any) -> subprocess.CompletedProcess[str]:
    """The command line, in this process."""
    out, err = io.StringIO(), io.StringIO()
    code: Any = 0
    words = ["penstock", *map(str, arguments)]
    with (
        pytest.MonkeyPatch.context() as patch,
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
    ):
        patch.setattr(sys, "argv", words)
        patch.setenv("COLUMNS", "400")
        try:
            main()
        except SystemExit as end:
            code = end.code or 0
    return subprocess.CompletedProcess(words, code, out.getvalue(), err.getvalue())


def small_files_only() -> None:
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (300, 300))


def settings(*extra: str) -> list[str]:
    return [part for key in (*TIGHT, *extra) for part in ("--set", key)]


def policy(**values: Any) -> Policy:
    return Policy(device_memory="220KiB", gather_rows=1000, resident_below=10, **values)


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def expected_score(resident: Any, tokenizer: Any, row: dict[str, Any]) -> float:
    """By the model's own logits, one row at a time."""
    text = row.get("text", row.get("prompt", "") + row.get("completion", ""))
    encoded = tokenizer(text, return_offsets_mapping=True)
    ids = torch.tensor([encoded["input_ids"]])
    first = 1
    if "prompt" in row:
        ends = [end for _, end in encoded["offset_mapping"]]
        first = next(i for i, end in enumerate(ends) if end > len(row["prompt"]))
    with torch.inference_mode():
        logprobs = resident(ids).logits.float().log_softmax(-1)[0, :-1]
    chosen = logprobs.gather(-1, ids[0, 1:, None]).squeeze(-1)
    return float(chosen[first - 1 :].double().sum())


@pytest.mark.usefixtures("no_leaks")
def test_scores_equal_the_resident_models_and_come_in_order(
    folder: Path, resident: Any
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    with penstock.load(folder, policy(micro_batch_tokens=40)) as model:
        found = list(penstock.score(model, ROWS))
    assert [result["id"] for result in found] == [row["id"] for row in ROWS]
    for row, result in zip(ROWS, found, strict=True):
        expected = expected_score(resident, tokenizer, row)
        assert result["logprob"] == pytest.approx(expected, rel=1e-5)
        assert result["perplexity"] == pytest.approx(
            math.exp(-expected / result["tokens"]), rel=1e-5
        )


def test_the_batch_a_row_is_in_changes_nothing_but_the_last_bits(folder: Path) -> None:
    scores = []
    for tokens in (16, 64, 512):
        with penstock.load(folder, policy(micro_batch_tokens=tokens)) as model:
            scores.append([r["logprob"] for r in penstock.score(model, ROWS)])
    for other in scores[1:]:
        assert other == pytest.approx(scores[0], rel=1e-5)


def test_rows_are_taken_lazily(folder: Path) -> None:
    taken = 0

    def rows() -> Any:
        nonlocal taken
        for index in range(10_000):
            taken += 1
            yield {"id": index, "text": "one two three four five six seven"}

    settings = policy(micro_batch_tokens=64, tokens_in_flight=128)
    with penstock.load(folder, settings) as model:
        results: Any = penstock.score(model, rows())
        first = [next(results) for _ in range(5)]
        results.close()
        again = list(penstock.score(model, ROWS))
    assert [result["id"] for result in first] == [0, 1, 2, 3, 4]
    assert taken < 1000
    assert len(again) == len(ROWS)


def test_windows_score_every_token_once_with_context(
    folder: Path, resident: Any
) -> None:
    text = "All happy families are alike; each unhappy family is so in its own way. "
    row = {"id": 0, "text": text * 3}
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = tokenizer(row["text"])["input_ids"]
    with penstock.load(folder, policy()) as model:
        (found,) = penstock.score(model, [row], window=40, stride=20)
    assert found["tokens"] == len(ids) - 1
    expected, scored = 0.0, 1
    end = 40
    while scored < len(ids):
        end = min(end, len(ids))
        part = torch.tensor([ids[max(0, end - 40) : end]])
        with torch.inference_mode():
            logprobs = resident(part).logits.float().log_softmax(-1)[0, :-1]
        chosen = logprobs.gather(-1, part[0, 1:, None]).squeeze(-1)
        expected += float(chosen[-(end - scored) :].sum())
        scored, end = end, end + 20
    assert found["logprob"] == pytest.approx(expected, rel=1e-5)


def test_a_text_longer_than_the_context_is_its_rows_error(folder: Path) -> None:
    long = {"id": "long", "text": "word " * 5000}
    with penstock.load(folder, policy()) as model:
        short, found = penstock.score(model, [ROWS[0], long])
        assert "logprob" in short
        assert "--window" in found["error"]
        with pytest.raises(UsageError, match="window of 1 "):
            penstock.score(model, [long], window=1)


def test_a_model_without_a_causal_head_is_refused(tmp_path: Path) -> None:
    zoo.save_checkpoint("bert", tmp_path)
    with (
        penstock.load(tmp_path) as model,
        pytest.raises(UsageError, match="no causal language model"),
    ):
        penstock.score(model, ROWS, tokenizer=object())


@pytest.mark.usefixtures("no_leaks")
def test_logits_that_overflow_are_the_rows_error(folder: Path) -> None:
    with penstock.load(folder, policy()) as model:
        head = model.lm_head
        hook = head.register_forward_hook(lambda m, a, out: out * float("nan"))
        results = list(penstock.score(model, ROWS))
        hook.remove()
    assert all("log-probability of nan" in result["error"] for result in results)


def test_a_model_that_fails_on_some_rows_fails_those_rows_only(folder: Path) -> None:
    def fail_on_zwoelf(module: Any, args: Any, kwargs: Any) -> None:
        if kwargs["input_ids"].shape[1] > 40:
            raise RuntimeError("too exotic")

    with penstock.load(folder, policy(micro_batch_tokens=16)) as model:
        hook = model.model.register_forward_pre_hook(fail_on_zwoelf, with_kwargs=True)
        rows = [*ROWS, {"id": "x", "text": "exotic " * 30}]
        *good, bad = penstock.score(model, rows)
        hook.remove()
    assert all("logprob" in result for result in good[:4])
    assert bad == {"id": "x", "error": "the model failed: RuntimeError: too exotic"}


# The command line.


def test_the_command_scores_a_file_and_reports(
    folder: Path, write: Callable[..., Path], tmp_path: Path
) -> None:
    output, report = tmp_path / "out.jsonl", tmp_path / "report"
    done = forked_python.run(
        *forked_python.COMMAND,
        *("score", folder, write(*ROWS), "-o", output),
        *("--report", report, *settings()),
    )
    assert done.returncode == 0, done.stderr
    assert "\x1b" not in done.stderr
    assert "scoring" not in done.stderr, "quiet without a terminal"
    assert [row["id"] for row in read(output)] == [row["id"] for row in ROWS]
    assert not output.with_name("out.jsonl.parts").exists()
    found = json.loads((report / "report.json").read_text())
    for key in REPORT_KEYS:
        assert key in found
    assert found["bytes_read"]["disk"] > 0
    assert found["peak_device_bytes"] <= 220 * 1024
    assert found["plan"]["passes"] == found["passes"] == 1


def test_bad_rows_are_named_by_line_and_the_job_goes_on(
    folder: Path, write: Callable[..., Path], tmp_path: Path
) -> None:
    output = tmp_path / "out.jsonl"
    source = write(
        ROWS[0], "{broken", {"id": "x"}, "[1]", {"id": 5, "text": 7}, ROWS[2]
    )
    done = run("score", folder, source, "-o", output, *settings())
    assert done.returncode == 1
    found = read(output)
    assert [row.get("id") for row in found] == ["a", 2, "x", 4, 5, 3]
    assert "line 2 is not valid JSON" in found[1]["error"]
    assert 'line 3 has no "text"' in found[2]["error"]
    assert "line 4 is not a JSON object" in found[3]["error"]
    assert "not a string" in found[4]["error"]
    assert "logprob" in found[5]
    assert "4 of 6 rows failed" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["{folder}", "{empty}", "-o", "{out}"], 2, "is empty"),
        (["{folder}", "nowhere.jsonl", "-o", "{out}"], 2, "cannot read nowhere.jsonl"),
        (["nowhere", "{rows}", "-o", "{out}"], 2, "nowhere is not a folder"),
        (["{folder}", "{rows}"], 2, "--output"),
        (["{folder}", "{rows}", "-o", "{out}", "--set", "slots=2"], 2, "known: "),
        (["{folder}", "{rows}", "-o", "{out}", "--policy", "no.yaml"], 2, "no.yaml"),
        (["{folder}", "{rows}", "-o", "/proc/nothing/out"], 3, "cannot write"),
        (["{folder}", "{rows}", "-o", "{rows}"], 2, "an input and the output"),
        (["{folder}", "{rows}", "-o", "-", "--retry-errors"], 2, "nothing is kept"),
        (
            ["{folder}", "{rows}", "-o", "{out}", "--restart", "--retry-errors"],
            2,
            "leave --retry-errors out",
        ),
        (
            ["{folder}", "{rows}", "-o", "{out}", "--set", "device_memory=8KiB"],
            3,
            "at least",
        ),
    ],
)
def test_what_a_user_gets_wrong_is_one_sentence_and_an_exit_code(
    arguments: list[str],
    code: int,
    message: str,
    folder: Path,
    write: Callable[..., Path],
    tmp_path: Path,
) -> None:
    empty = tmp_path / "empty.jsonl"
    empty.write_text("\n")
    names = {
        "folder": folder,
        "rows": write(*ROWS),
        "empty": empty,
        "out": tmp_path / "out.jsonl",
    }
    done = run("score", *[argument.format(**names) for argument in arguments])
    assert done.returncode == code, done.stderr
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "out.jsonl").exists()


def test_a_full_disk_is_one_sentence_and_can_be_gone_on_from(
    folder: Path, write: Callable[..., Path], tmp_path: Path
) -> None:
    output = tmp_path / "out.jsonl"
    arguments = ("score", folder, write(*ROWS), "-o", output)
    done = forked_python.run(*forked_python.COMMAND, *arguments, first=small_files_only)
    assert done.returncode == 3, done.stderr
    assert "out.jsonl.parts: File too large" in done.stderr
    assert "Traceback" not in done.stderr
    assert not output.exists()
    assert run(*arguments).returncode == 0
    assert [row["id"] for row in read(output)] == [row["id"] for row in ROWS]


def test_verify_says_equal_bit_for_bit(folder: Path) -> None:
    done = run("verify", folder, *settings())
    assert done.returncode == 0, done.stderr
    assert "equal, bit for bit" in done.stdout


def test_the_policy_command_prints_defaults_and_schema() -> None:
    settings = ("--set", "device_memory=2GiB")
    assert "device_memory: 2GiB\n" in run("policy", *settings).stdout
    shown = json.loads(run("policy", "--json", *settings).stdout)
    assert shown["device_memory"] == 2 << 30
    assert run("policy", "--list").stdout.split()[-1] == "t4-16gb"
    schema = json.loads(run("policy", "--schema").stdout)
    assert "tokens_in_flight" in schema["properties"]


def test_help_teaches_every_command() -> None:
    assert "score" in run("--help").stdout
    for command in ("score", "verify", "policy"):
        assert "--set" in run(command, "--help").stdout

"""Options that every command, or every job's command, has."""

from __future__ import annotations

import platform
from pathlib import Path

import pytest
import torch
import transformers
from typer.testing import CliRunner

import penstock
from penstock.io.errors import PolicyError
from penstock.offload.cli import app
from penstock.offload.commands.options import policy_of


def test_versions_are_printed() -> None:
    done = CliRunner().invoke(app, ["--version"])
    assert done.exit_code == 0
    named = [f"penstock {penstock.__version__}", f"torch {torch.__version__}"]
    named += [f"transformers {transformers.__version__}"]
    for text in (*named, f"Python {platform.python_version()}"):
        assert text in done.output


def test_device_and_dtype_win_over_the_policys() -> None:
    settings = ["device=cuda", "dtype=bfloat16"]
    found = policy_of(None, settings, device="cpu", dtype="float32")
    assert (found.device, found.dtype) == ("cpu", "float32")
    found = policy_of(None, settings, device=None, dtype=None)
    assert (found.device, found.dtype) == ("cuda", "bfloat16")


def test_what_is_no_device_or_dtype_is_said() -> None:
    with pytest.raises(PolicyError, match="float33"):
        policy_of(None, None, dtype="float33")
    with pytest.raises(PolicyError, match="abacus"):
        policy_of(None, None, device="abacus")


@pytest.mark.parametrize("command", ["score", "generate", "embed", "classify"])
def test_every_job_has_them(command: str, tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"id": 0, "text": "a"}\n')
    given = [str(tmp_path), str(rows), "-o", str(tmp_path / "out.jsonl")]
    if command == "classify":
        given += ["--label", " a", "--label", " b"]
    if command == "generate":
        given += ["--max-new-tokens", "2"]
    done = CliRunner().invoke(app, [command, *given, "--dtype", "float33"])
    assert isinstance(done.exception, PolicyError)
    assert "float33" in str(done.exception)

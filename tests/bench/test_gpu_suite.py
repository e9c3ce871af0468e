"""The GPU suite itself, where there is no GPU: a dry run, very small."""

from __future__ import annotations

import gzip
import importlib.util
import json
import os
import signal
import sys
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import IO, Any

import pytest

import forked_python

SUITE = Path(__file__).parents[2] / "bench" / "gpu_suite.py"


def supervise_forked(
    command: list[str],
    limit: float,
    env: dict[str, str],
    stdout: IO[str],
    stderr: IO[str],
) -> int:
    """Like the suite's own `supervise`, in a process that starts at once."""
    done = forked_python.run(
        *command[1:], env=env, first=partial(os.chdir, SUITE.parent)
    )
    stdout.write(done.stdout)
    stderr.write(done.stderr)
    return done.returncode


DryRun = Callable[..., tuple[int, dict[str, Any], str]]


@pytest.fixture
def dry_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> DryRun:
    """Runs the suite into `tmp_path`. Returns its exit code, suite.json and card.md."""
    import gpu_suite

    def run(*options: str) -> tuple[int, dict[str, Any], str]:
        words = [str(SUITE), "--out", str(tmp_path), "--dry-run", *options]
        monkeypatch.setattr(sys, "argv", words)
        monkeypatch.setattr(gpu_suite, "supervise", supervise_forked)
        handler = signal.getsignal(signal.SIGTERM)
        try:
            code = gpu_suite.main()
        finally:
            signal.signal(signal.SIGTERM, handler)
        suite = json.loads((tmp_path / "suite.json").read_text())
        return code, suite, (tmp_path / "card.md").read_text()

    return run


@pytest.mark.slow
def test_a_dry_run_leaves_figures_and_a_card(tmp_path: Path, dry_run: DryRun) -> None:
    code, suite, card = dry_run()
    assert code == 0, card
    parts = suite["parts"]
    has_accelerate = importlib.util.find_spec("accelerate") is not None
    rivals = parts.pop("rivals")
    assert rivals["status"] == ("done" if has_accelerate else "skipped: no accelerate")
    assert all(part["status"] == "done" for part in parts.values()), card
    assert parts["links"]["figures"]["copies"] == "skipped: no CUDA"
    assert parts["streaming"]["figures"]["bit_identical"] is True
    assert parts["api"]["figures"]["in_flight_8"]["tokens_per_second"] > 0
    if has_accelerate:
        assert rivals["figures"]["accelerate"]["tokens_per_second"] > 0
    assert parts["tracing"]["figures"]["rig"]["main_thread_waits"] == 0
    tests = parts["tests"]["figures"]
    assert tests["num_failed"] == 0
    assert tests["num_passed"] + tests["num_skipped"] > 0, "a file is found"
    assert "| link alone, of a bare loop of copies |" in card
    left = {path.name for path in tmp_path.iterdir()}
    traces = {"trace_rig.json.gz", "trace_sweep.json.gz"}
    assert left == {"suite.json", "card.md", "log.txt", *traces}


@pytest.mark.slow
def test_a_part_that_fails_is_reported_and_stops_no_other(
    dry_run: DryRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PENSTOCK_SUITE_FAIL", "links")
    code, suite, card = dry_run("--only", "machine", "links", "streaming")
    assert code == 1
    status = {name: part["status"] for name, part in suite["parts"].items()}
    assert status["links"] == "FAILED: exit code 1"
    assert status["machine"] == status["streaming"] == "done"
    assert "links was made to fail" in card


def test_a_process_that_takes_too_long_is_killed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(SUITE.parent))
    from gpu_suite import supervise

    sleeper = [sys.executable, "-c", "import time; time.sleep(600)"]
    with (tmp_path / "log").open("w") as log:
        assert supervise(sleeper, 0.1, dict(os.environ), log, log) is None
        assert (
            supervise([sys.executable, "-c", ""], 60, dict(os.environ), log, log) == 0
        )


def trace(folder: Path, *events: Mapping[str, Any]) -> Path:
    path = folder / "trace.json.gz"
    mark = {"name": "penstock: two passes", "cat": "user_annotation"}
    every = [{**mark, "ts": 0, "dur": 100, "tid": 7}, *events]
    with gzip.open(path, "wt") as file:
        json.dump({"traceEvents": [{"ph": "X", **event} for event in every]}, file)
    return path


def test_waits_are_counted_by_thread_and_overlap_by_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(SUITE.parent))
    from gpu.tracing import read

    wait = {"name": "cudaEventSynchronize", "cat": "cuda_runtime", "dur": 2}
    copy = {"name": "Memcpy HtoD (Pinned -> Device)", "cat": "gpu_memcpy", "tid": 1}
    kernel = {"name": "gemm", "cat": "kernel", "tid": 2}
    found = read(
        trace(
            tmp_path,
            {**wait, "ts": 10, "tid": 7},
            {**wait, "ts": 20, "tid": 8},
            {**wait, "ts": 120, "tid": 7},  # after the two passes
            {**kernel, "ts": 0, "dur": 50},
            {**copy, "ts": 40, "dur": 30},
        )
    )
    assert found["waits"] == {
        "main thread": {"cudaEventSynchronize": 1},
        "others": {"cudaEventSynchronize": 1},
    }
    assert found["main_thread_waits"] == 1
    assert found["h2d_seconds_beside_kernels"] == pytest.approx(10e-6)
    assert found["pageable_copies"] == 0

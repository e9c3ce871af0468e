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
import torch

import forked_python
import sim_build

SUITE = Path(__file__).parents[2] / "bench" / "gpu_suite.py"


def in_its_folder() -> None:
    os.chdir(SUITE.parent)


def supervise_forked(
    command: list[str],
    limit: float,
    env: dict[str, str],
    stdout: IO[str],
    stderr: IO[str],
    *,
    first: Callable[[], None],
) -> int:
    """Like the suite's own `supervise`, in a process that starts at once."""
    done = forked_python.run(*command[1:], env=env, first=first)
    stdout.write(done.stdout)
    stderr.write(done.stderr)
    return done.returncode


def can_be_simulated() -> bool:
    try:
        sim_build.compiled()
    except sim_build.NoCompilerError:
        return False
    return True


RunSuite = Callable[..., tuple[int, dict[str, Any], str]]


@pytest.fixture
def run_suite(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunSuite:
    """Runs the suite into `tmp_path`. Returns its exit code, suite.json and card.md."""
    import gpu_suite

    def run(
        *options: str, first: Callable[[], None] = in_its_folder
    ) -> tuple[int, dict[str, Any], str]:
        words = [str(SUITE), "--out", str(tmp_path), *options]
        monkeypatch.setattr(sys, "argv", words)
        supervise = partial(supervise_forked, first=first)
        monkeypatch.setattr(gpu_suite, "supervise", supervise)
        handler = signal.getsignal(signal.SIGTERM)
        try:
            code = gpu_suite.main()
        finally:
            signal.signal(signal.SIGTERM, handler)
        suite = json.loads((tmp_path / "suite.json").read_text())
        return code, suite, (tmp_path / "card.md").read_text()

    return run


@pytest.mark.slow
def test_a_dry_run_does_every_part_on_the_simulated_gpu(
    tmp_path: Path, run_suite: RunSuite
) -> None:
    """Or on the CPU, where it cannot be compiled."""
    is_simulated = can_be_simulated()
    has_accelerate = importlib.util.find_spec("accelerate") is not None
    code, suite, card = run_suite("--dry-run")
    assert code == 0, card
    assert suite["device"].startswith("simgpu:0" if is_simulated else "cpu: ")
    assert f"The device is {suite['device']}" in card
    parts = suite["parts"]
    assert all(part["status"] == "done" for part in parts.values()), card
    figures = {name: part["figures"] for name, part in parts.items()}
    assert figures["streaming"]["bit_identical"] is True
    assert figures["tiers"]["all_equal"] is True
    assert figures["api"]["in_flight_8"]["tokens_per_second"] > 0
    assert figures["rivals"]["resident"]["tokens_per_second"] > 0
    assert figures["rivals"]["plain"]["tokens_per_second"] > 0
    if has_accelerate:
        assert figures["rivals"]["accelerate"]["tokens_per_second"] > 0
    assert figures["tracing"]["rig"]["main_thread_waits"] == 0
    assert figures["tests"]["num_failed"] == 0
    if is_simulated:
        check_figures_of_a_gpu(figures)
        rows = [line.split("|")[1:3] for line in card.splitlines() if "| " in line]
        unknown = [label.strip() for label, value in rows if value.strip() == "-"]
        needed = ["disk to device directly"]
        if not has_accelerate:
            needed += [label for label in unknown if "accelerate" in label]
        assert unknown == needed, "every other row of the card has a figure"
    left = {path.name for path in tmp_path.iterdir()}
    traces = {"trace_rig.json.gz", "trace_sweep.json.gz"}
    assert left == {"suite.json", "card.md", "log.txt", *traces}


def check_figures_of_a_gpu(figures: Mapping[str, Any]) -> None:
    """What only a GPU has: links, peers, a clock and a memory of its own, traces."""
    links, tiers, tracing = (figures[name] for name in ("links", "tiers", "tracing"))
    for name in ("pinned_h2d", "pinned_d2h", "pageable_d2h", "from_peer", "to_peer"):
        assert min(links[f"{name}_bytes_per_second"].values()) > 0, name
    assert links["registered_h2d"]["fallback"] is None
    assert links["disk_to_device"]["fallback"] is None
    assert figures["tests"]["num_passed"] >= 3
    assert figures["streaming"]["alone"]["bytes_moved_per_pass"] > 0
    assert figures["streaming"]["not_pinned"] is None
    assert 0 < figures["api"]["peak_device_bytes"] < 2 * figures["api"]["weights_bytes"]
    assert figures["api"]["in_flight_8"]["bytes_moved"]["host"] > 0
    for tier in ("host", "disk", "peer"):
        assert tiers[f"weights_{tier}"]["bytes_moved"][tier] > 0
    for tier in ("device", "host", "disk"):
        assert set(tiers[f"kv_{tier}"]["kv_bytes_written"]) == {tier}
    for way in ("rig", "sweep"):
        assert tracing[way]["copies"]["Memcpy HtoD (Pinned -> Device)"] > 0
        assert tracing[way]["kernel_seconds"] > 0
        assert tracing[way]["pageable_copies"] == 0
    assert tracing["sweep"]["main_thread_waits_each"] <= 1


def without_compiler() -> None:
    """What a process of the suite begins with where nothing can be compiled."""
    os.chdir(SUITE.parent)

    def compiled() -> Path:
        raise sim_build.NoCompilerError("there is no C++ compiler called c++")

    sim_build.compiled = compiled


@pytest.mark.slow
def test_without_a_compiler_a_dry_run_is_on_the_cpu_and_says_so(
    run_suite: RunSuite,
) -> None:
    code, suite, card = run_suite(
        "--dry-run", "--only", "links", "streaming", first=without_compiler
    )
    assert code == 0, card
    words = "cpu: no simulated GPU, as there is no C++ compiler called c++"
    assert suite["device"] == words
    assert words in card
    assert suite["parts"]["links"]["figures"]["copies"] == "skipped: no accelerator"
    assert suite["parts"]["streaming"]["figures"]["bit_identical"] is True


@pytest.mark.slow
@pytest.mark.skipif(torch.accelerator.is_available(), reason="there is one")
def test_without_an_accelerator_only_a_dry_run_is_possible(
    run_suite: RunSuite,
) -> None:
    code, suite, card = run_suite("--only", "machine")
    assert code == 1
    assert suite["device"] is None
    assert "torch finds no accelerator here; --dry-run needs none" in card


@pytest.mark.slow
def test_a_part_that_fails_is_reported_and_stops_no_other(
    run_suite: RunSuite, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PENSTOCK_SUITE_FAIL", "links")
    code, suite, card = run_suite(
        "--dry-run", "--only", "machine", "links", "streaming"
    )
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
    from gpu.traces import read

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
            {**kernel, "ts": 75, "dur": 20},
        ),
        {7: "main"},
    )
    assert found["waits"] == {
        "main thread": {"cudaEventSynchronize": 1},
        "others": {"cudaEventSynchronize": 1},
    }
    assert found["main_thread_waits"] == 1
    assert found["h2d_seconds_beside_kernels"] == pytest.approx(10e-6)
    assert found["pageable_copies"] == 0
    assert found["waits_by_thread"] == {"main": 1, "8": 1}
    assert found["kernels_wait_for_copies_seconds"] == pytest.approx(20e-6)
    assert found["kernels_wait_for_host_seconds"] == pytest.approx(5e-6)

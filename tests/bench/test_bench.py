"""The benchmarks run, at toy size, and end with one JSON object."""

from __future__ import annotations

import json
import runpy
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

import forked_python
from checkpoint import make_checkpoint
from common import beside, turns
from common.generate_ceiling import Rates, Size, ceiling

BENCH = Path(__file__).parents[2] / "bench"


def run_worker(command: list[str], *rest: Any) -> dict[str, Any]:
    """Like `turns.run`, in a process that starts at once."""
    done = forked_python.run(*command[1:])
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


@pytest.mark.whole
@pytest.mark.slow
def test_the_benchmark_of_tiers_measures_every_reader(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    options = "--size 8MiB --rounds 1 --chunks 1MiB --depths 2"
    done = forked_python.run(BENCH / "tiers.py", *options.split(), "--out", tmp_path)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    ceilings = {"plain loop", *(["fio"] if shutil.which("fio") else [])}
    ways = {r["way"] for r in found["results"]}
    assert {"threads", "aiofiles", *ceilings} <= ways
    assert {r["way"] for r in found["results"] if r["of_ceiling"] is None} == ceilings
    assert all(r["bytes_per_second"] > 0 for r in found["results"])
    copied = {c["memory"]: c for c in found["copied"]}
    assert set(copied) == {"plain memory", "host tier", "host tier, shared"}
    assert all(c["bytes_per_second"] > 0 for c in copied.values())
    assert json.loads((tmp_path / "tiers.json").read_text()) == found
    assert (tmp_path / "tiers.png").stat().st_size > 1000


@pytest.mark.slow
@pytest.mark.whole
def test_the_benchmark_of_completions_compares_all_its_contenders(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    make_checkpoint(tmp_path / "tiny", "tiny", dtype="float32")
    options = "--prompt 6 --new 4 --sequences 8 --rows 16 --device-memory 1MiB"
    contenders = ["streamed", "fixed", "resident", "streamed:micro_batch_sequences=1"]
    script = str(BENCH / "generate.py")
    model = ["--model", str(tmp_path / "tiny"), "--contenders", *contenders]
    monkeypatch.setattr(sys, "argv", [script, *options.split(), *model])
    monkeypatch.setattr(turns, "run", run_worker)
    with pytest.raises(SystemExit) as end:
        runpy.run_path(script, run_name="__main__")
    assert end.value.code == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    rows = {row["name"]: row for row in found["results"]}
    assert set(rows) == set(contenders)
    assert all(row["output_tokens"] == 16 * 4 for row in rows.values())
    assert rows["streamed"]["passes"] == rows["fixed"]["passes"] == 8
    assert set(found["equal"].values()) == {1.0}


@pytest.mark.slow
@pytest.mark.whole
def test_the_benchmark_of_predictions_of_ranks_compares_them_with_jobs() -> None:
    done = forked_python.run(BENCH / "ranks" / "predicted.py", "--shapes", 1)
    found = json.loads(done.stdout.splitlines()[-1])
    (ratio,) = found["predicted_over_measured"].values()
    assert 0.05 < ratio < 2.0  # a busy machine takes longer
    assert done.returncode == (found["median_error"] > 0.15)


@pytest.mark.slow
def test_the_benchmark_of_coalescing_compares_three_ways() -> None:
    options = "--layers 2 --hidden 64 --groups 3 --tokens 4 --rounds 1"
    done = forked_python.run(BENCH / "coalescing.py", *options.split())
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert set(found["tokens_per_second"]) == {"wide", "apart", "coalesced"}
    joint = {run["case"]: run["joint_calls"] for run in found["runs"]}
    assert joint["wide"] == joint["apart"] == 0
    assert joint["coalesced"] >= 4 * 2 * 5  # tokens, layers; four products and an MLP


@pytest.mark.slow
def test_the_benchmark_of_simulations_runs_every_case() -> None:
    options = "--units 6 --micro-batches 3 --passes 32 --devices 2"
    done = forked_python.run(BENCH / "simulation.py", *options.split())
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    shapes = {(r["units"], r["passes"], r["devices"]) for r in found["results"]}
    assert shapes == {(6, 32, 1), (6, 2, 2), (48, 2, 1)}
    assert all(r["events"] > r["units"] * r["passes"] for r in found["results"])


def test_a_job_killed_for_real_goes_on_to_the_same_bytes() -> None:
    done = forked_python.run(BENCH / "kills.py", "--kills", 3, "--rows", 200)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["kills"] == 3
    assert found["jobs_that_differ"] == 0


@pytest.mark.whole
@pytest.mark.slow
def test_the_benchmark_of_rows_compares_with_a_larger_model(tmp_path: Path) -> None:
    make_checkpoint(tmp_path / "tiny", "tiny", dtype="float32")
    options = ("--rows", 2000, "--slice", 5, "--model", tmp_path / "tiny")
    done = forked_python.run(BENCH / "rows.py", *options)
    assert done.returncode in (0, 1), done.stderr  # the model is no larger
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["rows"] == 2000
    assert found["resident_spread"] < 0.1
    assert found["overhead"] > 0


def test_what_is_probed_beside_a_process_is_not_on_its_clock(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(beside, "EVERY_SECONDS", 0.7)
    code = (
        "import time\n"
        "start = time.perf_counter()\n"
        "steps = 0\n"
        "while steps < 400: time.sleep(0.005); steps += 1\n"
        "print(start, time.perf_counter() - start)\n"
    )
    command = [sys.executable, "-c", code]

    def probe() -> tuple[float, ...]:
        time.sleep(0.5)
        return 1.0, 3.0

    watch = beside.Beside(probe)
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        out, _ = watch.communicate(process)
    assert 1 <= len(watch.samples) == len(watch.stops)
    assert set(watch.samples) == {(1.0, 3.0)}
    start, seconds = map(float, out.split())
    found = {
        "loaded_at": start,
        "seconds": seconds,
        "tokens_per_second": 8.0,
        "output_tokens_per_second": 4.0,
    }
    watch.correct(found)
    assert found["stopped_seconds"] >= 0.5
    assert found["seconds"] == seconds - found["stopped_seconds"] >= 1.9
    assert found["tokens_per_second"] == 2 * found["output_tokens_per_second"] > 8.0


@pytest.mark.parametrize(
    ("rates", "seconds", "apart"),
    [
        # Products bind: 2 * (90 * 30 + 10 * 2 * 4), of which three are steps of two.
        (Rates(2.0, 2.0, 1e9), 2700.0 + 20.0 + 3 * 200.0, 3320.0),
        # Narrow ones are slower.
        (Rates(2.0, 1.0, 1e9), 2700.0 + 40.0 + 3 * 400.0, 3940.0),
        # The drive binds: 200 bytes of weights a pass, 5 for each of 2 * (15 + n) more.
        (Rates(1e9, 1e9, 1.0), 200 + 150 + 3 * 200 + 160 + 170 + 180, 800.0),
        # The drive binds steps only.
        (Rates(2.0, 1e9, 1.0), 2700.0 + 3 * 200 + 160 + 170 + 180, 3300.0),
    ],
)
def test_the_ceiling_of_completions(rates: Rates, seconds: float, apart: float) -> None:
    size = Size(90, 10, 200, 5)
    found = ceiling(size, [10, 20], 4, 2, rates, kv_on_disk=True)
    assert found["seconds"] == pytest.approx(seconds)
    assert found["seconds_apart"] == pytest.approx(apart)
    elsewhere = ceiling(size, [10, 20], 4, 2, rates, kv_on_disk=False)
    assert elsewhere["seconds"] == found["seconds_apart"]
    twice = ceiling(size, [10, 20] * 2, 4, 2, rates, kv_on_disk=True)
    assert twice["seconds"] == pytest.approx(2 * seconds)

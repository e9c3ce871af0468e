"""Whole jobs that several processes share, each with a model of its own."""

from __future__ import annotations

import os
import signal
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
from rich.console import Console

import forked_python
from checkpoint import make_checkpoint
from penstock import Policy
from penstock.io.errors import StoppedError, UsageError
from penstock.offload.jobs import worker_pool
from penstock.offload.jobs.budgets import Room, divided, threads_of
from penstock.offload.jobs.job import Done, Job
from penstock.offload.jobs.look import ProgressSnapshot, all_of
from penstock.offload.tasks.task import Task
from penstock.offload.tasks.task_progress import GenerateProgress, add_up
from shared_work import EXACT_STEPS, PARENT, Generating, Scoring, write_rows

NUM_ROWS = 40
GIB = 1 << 30


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models") / "tiny"
    return make_checkpoint(path, "tiny", dtype="float32", shards_of="100KB")


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write_rows(tmp_path / "in.jsonl", NUM_ROWS, wrong=20)


POLICY = EXACT_STEPS


@pytest.fixture
def leaves_nothing(
    request: pytest.FixtureRequest, own_processes: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Workers that begin at once; those of others import torch first."""
    monkeypatch.setattr(worker_pool, "_SPAWN", forked_python.context)
    request.getfixturevalue("no_leaks")


def run(work: Task, folder: Path, source: Path, output: Path, workers: int = 2) -> Done:
    job = Job(work, folder, source, output, POLICY, workers=workers)
    return job.run(Console(quiet=True))


@pytest.mark.slow
@pytest.mark.usefixtures("leaves_nothing")
def test_workers_make_the_bytes_of_one_though_one_of_them_is_killed(
    folder: Path, source: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run(Scoring(), folder, source, tmp_path / "one.jsonl", workers=1)
    work = Scoring(marker=tmp_path / "killed")
    done = run(work, folder, source, tmp_path / "two.jsonl")
    assert (tmp_path / "two.jsonl").read_bytes() == (
        tmp_path / "one.jsonl"
    ).read_bytes()
    assert (done.num_rows, done.num_errors) == (NUM_ROWS, 1)
    assert "a worker was killed by signal 9" in caplog.text
    report = done.report
    assert report is not None
    assert (report["rows"], report["rows_failed"]) == (NUM_ROWS, 1)
    assert report["workers"]["num"] == 2
    assert report["device_memory_bytes"] == 2 * (220 << 10)
    assert report["compute_seconds"] + report["wait_seconds"] <= report["seconds"] * 2


@pytest.mark.slow
@pytest.mark.usefixtures("leaves_nothing")
def test_workers_are_stopped_as_one_process_is_and_one_goes_on(
    folder: Path, source: Path, tmp_path: Path
) -> None:
    """Parts that have begun are finished first."""
    output, whole = tmp_path / "out.jsonl", tmp_path / "whole.jsonl"
    work = Generating(2, seed=3, options={"temperature": 1.2})
    told = replace(work, marker=tmp_path / "told", whom=PARENT, number=signal.SIGTERM)
    with pytest.raises(StoppedError, match="run the same command again") as caught:
        run(told, folder, source, output)
    assert caught.value.exit_code == 128 + signal.SIGTERM
    assert 0 < len(list((tmp_path / "out.jsonl.parts").glob("part-*"))) < 7
    run(work, folder, source, output, workers=1)
    run(work, folder, source, whole, workers=1)
    assert output.read_bytes() == whole.read_bytes()


FOLDER = "PENSTOCK_TEST_FOLDER"
KILLED = """
import sys
from pathlib import Path
from rich.console import Console
from penstock.offload.jobs.job import Job
from shared_work import PARENT, Scoring
from test_sharing import POLICY
folder, source, output, marker = map(Path, sys.argv[1:])
work = Scoring(marker=marker, whom=PARENT)
Job(work, folder, source, output, POLICY, workers=2).run(Console(quiet=True))
"""


@pytest.mark.slow
def test_no_worker_outlives_who_began_it(
    folder: Path, source: Path, tmp_path: Path
) -> None:
    """Nor does one whose parent was killed while it computes."""
    marker = tmp_path / "worker"
    arguments = (folder, source, tmp_path / "out.jsonl", marker)
    env = {"PYTHONPATH": os.pathsep.join(sys.path), FOLDER: f"{tmp_path}"}
    done = forked_python.run("-c", KILLED, *arguments, env=env)
    assert done.returncode == -signal.SIGKILL
    assert marker.exists(), "a worker was computing"
    ours = [process for process in psutil.process_iter() if _is_of(process, tmp_path)]
    _, alive = psutil.wait_procs(ours, timeout=120)
    assert not [p for p in alive if p.status() != psutil.STATUS_ZOMBIE]


def _is_of(process: psutil.Process, folder: Path) -> bool:
    """Whether it was begun, by whomever, for a test in `folder`."""
    try:
        return bool(process.environ().get(FOLDER) == f"{folder}")
    except psutil.Error:
        return False


def test_less_than_one_worker_is_refused(
    folder: Path, source: Path, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match="--workers 0: at least one"):
        run(Scoring(), folder, source, tmp_path / "out.jsonl", workers=0)


# Who gets how much.


def room(**changed: Any) -> Room:
    free = {"device": 16 * GIB, "host": 32 * GIB, "disk": 64 * GIB}
    values = {"num_gpus": 0, "free_bytes": free, "model_bytes": 100 * GIB, **changed}
    return Room(**values)


def test_what_is_auto_is_divided_and_what_was_said_is_for_each() -> None:
    found = divided(Policy(), 4, room())
    assert {policy.device_memory for policy in found.policies} == {"auto"}
    assert {policy.memory for policy in found.policies} == {31 * GIB // 4}
    assert "8,321,499,136 bytes are for each of 4 workers" in found.notes[0]
    asked = divided(Policy(memory="4GiB"), 3, room(taken_bytes=GIB))
    assert {policy.memory for policy in asked.policies} == {GIB}
    said = divided(Policy(device_memory="1GiB"), 4, room())
    assert {policy.device_memory for policy in said.policies} == {GIB}
    assert "4,294,967,296 bytes together" in said.notes[1]
    assert (threads_of(8, 3), threads_of(2, 4)) == (2, 1)


def test_workers_share_host_memory_unless_they_are_told_not_to() -> None:
    found = divided(Policy(host_memory="1GiB"), 2, room())
    assert all(policy.host_shared for policy in found.policies)
    assert any("host_shared: true" in note for note in found.notes)
    assert {policy.memory for policy in found.policies} == {16 * GIB}, "one copy"
    told = divided(Policy(host_memory="1GiB", host_shared=False), 2, room())
    assert not any(policy.host_shared for policy in told.policies)
    assert not divided(Policy(), 2, room()).policies[0].host_shared


def test_each_worker_has_a_gpu_of_its_own_as_far_as_there_are_some() -> None:
    four = divided(Policy(device="cuda"), 4, room(num_gpus=2))
    assert [policy.device for policy in four.policies] == ["cuda:0", "cuda:1"] * 2
    assert four.policies[0].device_memory == 4 * GIB, "two share each"
    two = divided(Policy(device="cuda"), 2, room(num_gpus=2))
    assert two.policies[0].device_memory == 8 * GIB
    named = divided(Policy(device="cuda:1"), 2, room(num_gpus=2))
    assert [policy.device for policy in named.policies] == ["cuda:1"] * 2
    assert named.policies[0].device_memory == 4 * GIB


def test_keys_and_values_that_nobody_said_are_divided() -> None:
    policy = Policy(device_memory="1GiB", kv={"tier": "host", "limits": {"host": 7}})
    (found, _), _ = divided(policy, 2, room())
    assert found.kv.limits == {"host": 7, "disk": 32 * GIB}
    policy = Policy(device="cuda", kv={"tier": "device"})
    (found, _), _ = divided(policy, 2, room())
    assert found.kv.limits == {"device": 4 * GIB, "disk": 32 * GIB}, "host: of memory"
    (plain, _), _ = divided(Policy(device_memory="1GiB"), 2, room())
    assert plain.kv.limits == {}


def test_counters_of_workers_add_up() -> None:
    progress = GenerateProgress(output_tokens=99)
    parts = [GenerateProgress(output_tokens=n, max_new_tokens=8) for n in (3, 4)]
    add_up(progress, parts)
    assert (progress.output_tokens, progress.max_new_tokens) == (7, 8)
    one = ProgressSnapshot(rows=1.5, tokens=2, bytes_read={"disk": 3}, resident_bytes=5)
    two = ProgressSnapshot(
        rows=2.0, tokens=3, bytes_read={"disk": 4, "host": 1}, device_bytes=6
    )
    both = all_of([one, two])
    assert (both.rows, both.tokens, both.resident_bytes) == (3.5, 5, 5)
    assert both.bytes_read == {"disk": 7, "host": 1}
    assert both.device_bytes == 6

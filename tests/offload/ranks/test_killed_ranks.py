"""A job of two ranks, killed at random instants and run again, makes the same bytes."""

from __future__ import annotations

import random
import signal
import time
from dataclasses import replace
from pathlib import Path

import pytest
from rank_kills import RankedJob, ShortGenerate, ShortScore

from checkpoint import make_checkpoint
from penstock.offload.tasks.task import Task
from shared_work import EXACT_STEPS, write_rows

NUM_ROWS = 20
POLICY = EXACT_STEPS
TASKS = [ShortScore(), ShortGenerate(3, seed=3, options={"temperature": 1.2})]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models") / "tiny"
    return make_checkpoint(path, "tiny", dtype="float32", shards_of="100KB")


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write_rows(tmp_path / "in.jsonl", NUM_ROWS)


@pytest.mark.slow
@pytest.mark.usefixtures("own_processes")
@pytest.mark.parametrize("task", TASKS, ids=lambda task: str(task.name))
@pytest.mark.parametrize(
    "num_kills", [pytest.param(n, marks=pytest.mark.whole) for n in (2, 50)], ids=str
)
def test_either_rank_is_killed_at_any_instant_and_the_output_is_the_same(
    num_kills: int, task: Task, folder: Path, source: Path, tmp_path: Path
) -> None:
    whole = RankedJob(task, folder, source, tmp_path / "whole.jsonl", POLICY)
    began = time.monotonic()
    assert whole.run_for(300, 0) == 0
    seconds = time.monotonic() - began
    expected = whole.output.read_bytes()
    assert len(expected.splitlines()) == NUM_ROWS
    drawn = random.Random(11)
    kills = [(drawn.uniform(0.1, 0.9), drawn.randrange(2)) for _ in range(num_kills)]
    kills[:2] = [(0.7, 0), (0.8, 1)]
    num_jobs = 0
    while kills:
        job = replace(whole, output=tmp_path / f"out-{num_jobs}.jsonl")
        num_jobs += 1
        for _ in range(4):  # then it may finish
            share, whom = kills.pop() if kills else (1000.0, 0)
            code = job.run_for(share * seconds, whom)
            assert code in (0, 1, -signal.SIGKILL)
            if code == 0:
                break
        else:
            assert job.run_for(300, 0) == 0
        assert job.output.read_bytes() == expected

"""Jobs whose processes read each unit together make the bytes of one process."""

from __future__ import annotations

import json
import os
import signal
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest
from rank_tasks import FallingScore
from rich.console import Console

import forked_python
from checkpoint import make_checkpoint
from penstock import Policy
from penstock.io.errors import RanksError
from penstock.offload.files.parts import Cut
from penstock.offload.jobs import worker_pool
from penstock.offload.jobs.job import Done, Job
from penstock.offload.jobs.ranked import joined_ranks
from penstock.offload.ranks.joining import LOCAL, local_store
from penstock.offload.tasks.classify_task import Classify
from penstock.offload.tasks.embed_task import Embed
from penstock.offload.tasks.generate_task import Generate
from penstock.offload.tasks.score_task import Score
from penstock.offload.tasks.task import Task
from shared_work import SMALL_STEPS, write_rows

NUM_ROWS = 40
POLICY = SMALL_STEPS


@dataclass(frozen=True)
class ScoreInParts(Score):
    """Score, in small parts, so that all ranks get some."""

    def cut(self, policy: Policy) -> Cut:
        return Cut(6, 1 << 20)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models") / "tiny"
    return make_checkpoint(path, "tiny", dtype="float32", shards_of="100KB")


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write_rows(tmp_path / "in.jsonl", NUM_ROWS, wrong=20)


@pytest.fixture(autouse=True)
def begins_at_once(own_processes: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker_pool, "_SPAWN", forked_python.context)


def run(task: Task, folder: Path, source: Path, output: Path, ranks: int) -> Done:
    policy = POLICY if ranks == 1 else POLICY.with_settings(["ranks=gather"])
    job = Job(task, folder, source, output, policy, workers=ranks)
    return job.run(Console(quiet=True))


@pytest.mark.slow
@pytest.mark.parametrize(
    "task",
    [
        ScoreInParts(),
        pytest.param(Embed(), marks=pytest.mark.whole),
        pytest.param(Classify(labels=(" a", " b c")), marks=pytest.mark.whole),
        Generate(4, seed=3, options={"temperature": 1.2}),
    ],
    ids=lambda task: task.name,
)
def test_two_ranks_make_the_bytes_of_one_process(
    task: Any, folder: Path, source: Path, tmp_path: Path
) -> None:
    one, two = tmp_path / "one.jsonl", tmp_path / "two.jsonl"
    run(task, folder, source, one, 1)
    done = run(task, folder, source, two, 2)
    assert two.read_bytes() == one.read_bytes()
    assert (done.num_rows, done.num_errors) == (NUM_ROWS, 1)
    assert done.report is not None
    ranks = done.report["ranks"]
    assert ranks["num_ranks"] == 2
    assert ranks["bytes_sent"] > 100_000


@pytest.mark.slow
@pytest.mark.parametrize(
    "number", [pytest.param(signal.SIGKILL, marks=pytest.mark.whole), signal.SIGSTOP]
)
def test_a_rank_that_falls_ends_the_job_and_it_goes_on(
    number: int, folder: Path, source: Path, tmp_path: Path
) -> None:
    """Within five seconds, whether it is killed or stopped."""
    one, two = tmp_path / "one.jsonl", tmp_path / "two.jsonl"
    marker = tmp_path / "fallen"
    task = FallingScore(marker=marker, first=os.getpid(), number=number)
    try:
        with pytest.raises(RanksError, match="rank"):
            run(task, folder, source, two, 2)
        ended = time.time()
    finally:
        with suppress(psutil.NoSuchProcess):
            psutil.Process(int(marker.read_text())).kill()
    assert ended - marker.stat().st_mtime < 60  # five, on a machine that is not busy
    assert (tmp_path / "two.jsonl.parts").exists()
    run(FallingScore(), folder, source, two, 2)
    run(FallingScore(), folder, source, one, 1)
    assert two.read_bytes() == one.read_bytes()


def rank_main(
    rank: int, num: int, port: int, folder: Path, source: Path, output: Path
) -> None:
    """What each process of torchrun does: it has another number of CPUs, perhaps, but
    the same command line."""
    os.environ |= {
        "RANK": f"{rank}",
        "WORLD_SIZE": f"{num}",
        "LOCAL_WORLD_SIZE": f"{num}",
        "MASTER_ADDR": LOCAL,
        "MASTER_PORT": f"{port}",
    }
    policy = POLICY.with_settings(["ranks=gather"])
    others = joined_ranks(ScoreInParts(), folder, policy)
    if others is None:
        return
    with others:
        job = Job(
            ScoreInParts(), folder, source, output, policy, workers=num, others=others
        )
        done = job.run(Console(quiet=True))
    assert done.report is not None
    output.with_suffix(".ranks").write_text(json.dumps(done.report["ranks"]))


@pytest.mark.slow
@pytest.mark.whole
def test_ranks_of_torchrun_make_the_bytes_of_one_process(
    folder: Path, source: Path, tmp_path: Path
) -> None:
    one, two = tmp_path / "one.jsonl", tmp_path / "two.jsonl"
    run(ScoreInParts(), folder, source, one, 1)
    with_port = local_store()
    port = with_port.port
    del with_port  # the first rank takes it
    processes = [
        forked_python.context.Process(
            target=rank_main, args=(rank, 2, port, folder, source, two)
        )
        for rank in range(2)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(200)
    assert [process.exitcode for process in processes] == [0, 0]
    assert two.read_bytes() == one.read_bytes()
    ranks = json.loads(two.with_suffix(".ranks").read_text())
    assert ranks["num_ranks"] == 2
    assert ranks["bytes_sent"] > 100_000

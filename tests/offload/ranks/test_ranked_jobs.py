"""Jobs whose model several processes share make the bytes that one process makes."""

from __future__ import annotations

import json
import os
import signal
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest
from rank_tasks import FallingScore
from rich.console import Console

import forked_python
from checkpoint import make_checkpoint
from penstock import Policy
from penstock.io.errors import (
    PenstockError,
    PolicyError,
    RanksError,
    StoppedError,
    UsageError,
)
from penstock.offload.jobs import ranked
from penstock.offload.jobs.job import Done, Job
from penstock.offload.jobs.ranked import OtherRanks
from penstock.offload.jobs.sharing import check_ranks
from penstock.offload.tasks.classify_task import Classify
from penstock.offload.tasks.embed_task import Embed
from penstock.offload.tasks.generate_task import Generate
from penstock.offload.tasks.score_task import Score
from penstock.offload.tasks.task import Task
from shared_work import SMALL_STEPS, write_rows

NUM_ROWS = 30
POLICY = SMALL_STEPS

TENSOR = POLICY.with_settings(["ranks=tensor"])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models") / "tiny"
    return make_checkpoint(path, "tiny", dtype="float32", shards_of="100KB")


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write_rows(tmp_path / "in.jsonl", NUM_ROWS, wrong=20)


@pytest.fixture(autouse=True)
def begins_at_once(own_processes: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ranked, "_SPAWN", forked_python.context)


def run(
    task: Task,
    folder: Path,
    source: Path,
    output: Path,
    ranks: int,
    report: Path | None = None,
    policy: Policy = POLICY,
) -> Done:
    others = OtherRanks(ranks)
    with others:
        job = Job(task, folder, source, output, policy, report, others=others)
        return job.run(Console(quiet=True))


@pytest.mark.slow
@pytest.mark.parametrize(
    "task",
    [
        Score(),
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
    first, other = done.report["per_rank"]
    assert (first["rank"], other["rank"]) == (0, 1)
    assert other["num_sent"] > 0
    assert other["bytes_read"]["disk"] > 0
    assert done.report["plan"]["predicted_seconds"] > 0
    assert 0 < done.report["plan"]["mfu"] < 1


@pytest.mark.slow
@pytest.mark.parametrize(
    ("task", "num"),
    [(Score(), 2), (Generate(4, seed=3, options={"temperature": 1.2}), 3)],
    ids=["score", "generate"],
)
def test_ranks_that_divide_products_make_the_bytes_of_one_process(
    task: Any, num: int, folder: Path, source: Path, tmp_path: Path
) -> None:
    one, several = tmp_path / "one.jsonl", tmp_path / "several.jsonl"
    run(task, folder, source, one, 1)
    done = run(task, folder, source, several, num, policy=TENSOR)
    assert several.read_bytes() == one.read_bytes()
    assert (done.num_rows, done.num_errors) == (NUM_ROWS, 1)
    assert done.report is not None
    per_rank = done.report["per_rank"]
    assert [each["rank"] for each in per_rank] == list(range(num))
    assert all(each["num_sent"] > 0 for each in per_rank)
    assert done.report["ranks"]["num_gathers"] > 0
    assert done.report["plan"]["predicted_seconds"] > 0


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "policy"),
    [(signal.SIGKILL, POLICY), (signal.SIGSTOP, POLICY), (signal.SIGKILL, TENSOR)],
)
def test_a_rank_that_falls_ends_the_job_and_it_goes_on(
    number: int, policy: Policy, folder: Path, source: Path, tmp_path: Path
) -> None:
    """Within five seconds, whether it is killed or stopped."""
    one, two = tmp_path / "one.jsonl", tmp_path / "two.jsonl"
    marker = tmp_path / "fallen"
    task = FallingScore(marker=marker, first=os.getpid(), number=number)
    try:
        with pytest.raises(RanksError, match="rank 1 is gone"):
            run(task, folder, source, two, 2, tmp_path / "report", policy)
        ended = time.time()
    finally:
        with suppress(psutil.NoSuchProcess):
            psutil.Process(int(marker.read_text())).kill()
    assert ended - marker.stat().st_mtime < 60  # five, on a machine that is not busy
    assert (tmp_path / "two.jsonl.parts").exists()
    report = json.loads((tmp_path / "report" / "report.json").read_text())
    assert "rank 1 is gone" in report["fallbacks"][-1]
    assert [one["rank"] for one in report["per_rank"]] == [0]
    run(FallingScore(), folder, source, two, 2, policy=policy)
    run(FallingScore(), folder, source, one, 1)
    assert two.read_bytes() == one.read_bytes()


@pytest.mark.slow
def test_a_signal_finishes_the_parts_under_way_and_one_process_goes_on(
    folder: Path, source: Path, tmp_path: Path
) -> None:
    one, two = tmp_path / "one.jsonl", tmp_path / "two.jsonl"
    task = FallingScore(
        marker=tmp_path / "told", first=os.getpid(), number=signal.SIGTERM,
        hits_first=True,
    )  # fmt: skip
    with pytest.raises(StoppedError, match="run the same command again"):
        run(task, folder, source, two, 2)
    assert list((tmp_path / "two.jsonl.parts").glob("part-*"))
    run(FallingScore(), folder, source, two, 1)
    run(FallingScore(), folder, source, one, 1)
    assert two.read_bytes() == one.read_bytes()


@pytest.mark.slow
def test_what_a_rank_cannot_do_is_said_by_the_first(
    folder: Path, source: Path, tmp_path: Path
) -> None:
    """Here it has no tokenizer for the labels that it is to use."""
    with pytest.raises(PenstockError) as caught:
        run(Embed(truncate=10**6), folder, source, tmp_path / "out.jsonl", 2)
    assert "cannot be cut to 1000000 tokens" in str(caught.value)


def test_a_policy_that_ranks_cannot_have_is_refused_before_they_begin(
    folder: Path,
) -> None:
    with OtherRanks(2) as others:
        with pytest.raises(PolicyError, match="ranks: pipeline excludes compile"):
            others.load(Score(), folder, Policy(compile=True))
        assert not others._processes


def test_more_ranks_than_blocks_are_refused_before_they_begin(folder: Path) -> None:
    with OtherRanks(99) as others:
        with pytest.raises(UsageError, match="99 ranks cannot share a model of"):
            others.load(Score(), folder, POLICY)
        assert not others._processes


@pytest.mark.parametrize(("num", "local", "nodes"), [(4, 2, 2), (5, 2, 1), (2, 2, 1)])
def test_plans_know_on_how_many_machines_ranks_are(
    num: int, local: int, nodes: int
) -> None:
    assert OtherRanks().group is None
    found = OtherRanks(num, num_local=local).group
    assert found is not None
    assert (found.num, found.num_nodes) == (num, nodes)


def test_ranks_and_workers_exclude_each_other() -> None:
    with pytest.raises(UsageError, match="at least one"):
        check_ranks(0, 1)
    with pytest.raises(UsageError, match="leave one of the two out"):
        check_ranks(2, 2)
    for num, workers in ((2, 1), (1, 2)):
        with pytest.raises(UsageError, match="torchrun has started 3 ranks"):
            check_ranks(num, workers, 3)
    check_ranks(1, 1, 3)
    check_ranks(2, 1)
    check_ranks(1, 3)

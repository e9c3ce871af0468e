"""Jobs whose workers read the weights once for all of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

import forked_python
from checkpoint import make_checkpoint
from penstock import Policy
from penstock.io.errors import MachineError
from penstock.io.readers.files import reads_directly
from penstock.offload.jobs import read_once, worker_pool
from penstock.offload.jobs.job import Job
from penstock.offload.jobs.read_once import open_ring, ring_bytes, why_not
from penstock.offload.tasks.classify_task import Classify
from penstock.offload.tasks.embed_task import Embed
from penstock.offload.tasks.generate_task import Generate
from penstock.offload.tasks.task import Task
from shared_work import EXACT_STEPS, Scoring, write_rows
from shares import shared

NUM_ROWS = 24
GIB = 1 << 30
POLICY = EXACT_STEPS


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models") / "tiny"
    make_checkpoint(path, "tiny", dtype="float32", shards_of="100KB")
    if not reads_directly(next(path.glob("*.safetensors"))):
        pytest.skip("the folder of tests has no O_DIRECT")
    return path


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write_rows(tmp_path / "in.jsonl", NUM_ROWS)


@pytest.fixture
def leaves_nothing(
    request: pytest.FixtureRequest, own_processes: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Workers that begin at once; those of others import torch first."""
    monkeypatch.setattr(worker_pool, "_SPAWN", forked_python.context)
    request.getfixturevalue("no_leaks")


def report_of(
    task: Task, folder: Path, source: Path, output: Path, **how: Any
) -> dict[str, Any]:
    policy = how.pop("policy", POLICY)
    job = Job(task, folder, source, output, policy, **{"workers": 2, **how})
    report = job.run(Console(quiet=True)).report
    assert report is not None, "there was something to do"
    return report


TASKS = (
    Scoring(),
    Generate(2),
    Embed(),
    Classify(labels=(" a", " b")),
)


@pytest.mark.slow
@pytest.mark.usefixtures("leaves_nothing")
@pytest.mark.parametrize(
    "task", shared(TASKS, lambda place, _: place < 2), ids=lambda task: str(task.name)
)
def test_workers_that_share_reads_make_the_same_bytes_and_read_less(
    task: Task, folder: Path, source: Path, tmp_path: Path
) -> None:
    one, two = tmp_path / "one.jsonl", tmp_path / "two.jsonl"
    report_of(task, folder, source, one, workers=1)
    found = report_of(task, folder, source, two)
    assert two.read_bytes() == one.read_bytes()
    assert found["bytes_shared"] > 0
    assert not found["fallbacks"]
    assert any("workers share what they read" in n for n in found["workers"]["notes"])


@pytest.mark.slow
@pytest.mark.usefixtures("leaves_nothing")
def test_a_worker_that_is_killed_holds_up_no_other(
    folder: Path, source: Path, tmp_path: Path
) -> None:
    whole, output = tmp_path / "whole.jsonl", tmp_path / "out.jsonl"
    report_of(Scoring(), folder, source, whole, workers=1)
    work = Scoring(marker=tmp_path / "killed")
    found = report_of(work, folder, source, output, workers=3)
    assert output.read_bytes() == whole.read_bytes()
    assert found["bytes_shared"] > 0


@pytest.mark.slow
@pytest.mark.usefixtures("leaves_nothing")
def test_sharing_can_be_switched_off_and_says_so(
    folder: Path, source: Path, tmp_path: Path
) -> None:
    policy = POLICY.with_settings(["io.read_once=false"])
    found = report_of(Scoring(), folder, source, tmp_path / "o.jsonl", policy=policy)
    assert found["bytes_shared"] == 0
    assert (
        "io.read_once: false: each worker reads all itself"
        in (found["workers"]["notes"])
    )


def test_workers_share_what_no_page_cache_shares(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = list(folder.glob("*.safetensors"))
    assert why_not(Policy(), files) is None
    for settings, reason in (
        (["io.read_once=false"], "false"),
        (["io.direct=false"], "page cache"),
        (["io.reader=aiofiles"], "page cache"),
        (["io.reader=gds", "device=cuda"], "gds"),
    ):
        assert reason in (why_not(Policy().with_settings(settings), files) or "")
    monkeypatch.setattr(read_once, "reads_directly", lambda path: False)
    assert "no O_DIRECT" in (why_not(Policy(), files) or "")


def test_the_memory_that_is_shared_is_a_small_part() -> None:
    assert ring_bytes(80 * GIB, 256 * GIB) == GIB
    assert ring_bytes(80 * GIB, 8 * GIB) == GIB // 2
    assert ring_bytes(4 * GIB, 64 * GIB) == GIB // 2
    assert ring_bytes(4 * GIB, -1) == 0


def test_without_room_or_such_memory_each_worker_reads_all_itself(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    ring, note = open_ring(Policy(), 2, 1000)
    assert ring is None
    assert "1,000 bytes are too few for 2 workers" in note

    def refuses(shape: object) -> None:
        raise MachineError("8 bytes of memory cannot be shared (no such call)")

    monkeypatch.setattr(read_once, "SharedRing", refuses)
    ring, note = open_ring(Policy(), 2, GIB)
    assert ring is None
    assert "cannot be shared (no such call): each worker reads all itself" in note
    assert caplog.messages == [note]

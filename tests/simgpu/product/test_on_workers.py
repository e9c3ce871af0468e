"""Several processes share a job, each with a simulated GPU of its own."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from test_on_tasks import SMALL

from checkpoint import make_checkpoint
from penstock import Policy
from penstock.io.devices.accelerators import memory_of
from penstock.offload.files.parts import NumberedRows
from penstock.offload.jobs.job import Done, Job
from penstock.offload.jobs.ranked import OtherRanks
from penstock.offload.model import engine_of
from penstock.offload.tasks.score_task import Score
from penstock.offload.tasks.task_progress import TaskProgress
from shared_work import Scoring
from sim_device import SimGpu

pytestmark = pytest.mark.simgpu

NUM_ROWS = 60


@dataclass(frozen=True)
class Placed(Scoring):
    """Notes in `places` which process computes on which device. No process begins
    before there are two of them."""

    places: str = ""

    def results(
        self,
        model: Any,
        tokenizer: Any,
        parts: Iterator[NumberedRows],
        progress: TaskProgress,
    ) -> Iterator[dict[str, Any]]:
        places = Path(self.places)
        (places / f"{os.getpid()}").write_text(str(model.device))
        while len(list(places.iterdir())) < 2:
            threading.Event().wait(0.01)
        return super().results(model, tokenizer, parts, progress)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return make_checkpoint(
        tmp_path / "tiny", "tiny", dtype="float32", shards_of="100KB"
    )


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "in.jsonl"
    rows = [{"id": n, "text": "word " * (2 + n * 7 % 5)} for n in range(NUM_ROWS)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def run(
    work: Scoring, folder: Path, source: Path, device: str, workers: int, **more: Any
) -> tuple[Done, bytes]:
    output = source.parent / f"{workers}-on-{device}.jsonl"
    policy = Policy(device=device, **SMALL, **more)
    job = Job(work, folder, source, output, policy, workers=workers)
    return job.run(Console(quiet=True)), output.read_bytes()


def test_workers_have_a_device_each_though_one_of_them_is_killed(
    simgpu: SimGpu,
    folder: Path,
    source: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    _, expected = run(Scoring(), folder, source, "cpu", 1)
    places = tmp_path / "places"
    places.mkdir()
    work = Placed(marker=tmp_path / "killed", places=str(places))
    done, found = run(work, folder, source, "simgpu", 2, host_memory="1MiB")
    assert found == expected
    assert (done.num_rows, done.num_errors) == (NUM_ROWS, 0)
    assert "a worker was killed by signal 9" in caplog.text
    assert "host_shared: true" in caplog.text
    devices = {path.read_text() for path in places.iterdir()}
    assert devices == {"simgpu:0", "simgpu:1"}
    report = done.report
    assert report is not None
    assert report["bytes_read"]["host"] > 0
    assert not list(Path("/dev/shm").glob(f"*{os.getpid()}*"))


@dataclass(frozen=True)
class PlacedRanks(Score):
    """Notes in `places` which process computes on which device."""

    places: str = ""

    def results(
        self,
        model: Any,
        tokenizer: Any,
        parts: Iterator[NumberedRows],
        progress: TaskProgress,
    ) -> Iterator[dict[str, Any]]:
        budget = engine_of(model).policy.device_memory
        place = Path(self.places) / f"{os.getpid()}"
        place.write_text(f"{model.device} {budget}")
        return super().results(model, tokenizer, parts, progress)


@pytest.mark.parametrize(
    ("device", "places"),
    [
        ("simgpu", ["simgpu:0", "simgpu:1"]),
        pytest.param("simgpu:1", ["simgpu:1"] * 2, marks=pytest.mark.whole),
    ],
)
def test_ranks_have_a_device_each_or_divide_one(
    simgpu: SimGpu,
    folder: Path,
    source: Path,
    tmp_path: Path,
    device: str,
    places: list[str],
) -> None:
    _, expected = run(Scoring(), folder, source, "cpu", 1)
    noted = tmp_path / "places"
    noted.mkdir()
    policy = Policy(device=device, **{**SMALL, "device_memory": "auto"})
    with OtherRanks(2) as others:
        job = Job(
            PlacedRanks(places=str(noted)),
            folder,
            source,
            tmp_path / "out.jsonl",
            policy,
            others=others,
        )
        job.run(Console(quiet=True))
    assert (tmp_path / "out.jsonl").read_bytes() == expected
    found = [path.read_text().split() for path in noted.iterdir()]
    assert sorted(place for place, _ in found) == places
    free = memory_of(device)[0]
    assert all(0 < int(budget) <= free // 2 for _, budget in found)

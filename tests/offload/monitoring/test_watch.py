"""Who is told how a job goes, and when: by a clock of ours."""

from __future__ import annotations

import io
import json
import sys
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families
from rich.console import Console

from checkpoint import make_checkpoint
from penstock import Policy
from penstock.io.errors import OutputError, UsageError
from penstock.offload.jobs.job import Job
from penstock.offload.jobs.watch import Watching
from penstock.offload.monitoring.metrics import MetricsFile
from penstock.offload.monitoring.monitor import Every, Monitor, interval_seconds
from penstock.offload.monitoring.progress import JobBar, JsonLines, PlainLines
from penstock.offload.monitoring.samples import ResourceSample, Window
from penstock.offload.tasks.score_task import Score
from penstock.offload.tasks.task_progress import GenerateProgress, ScoreProgress

SAMPLE = ResourceSample(
    seconds=30.0,
    stage="scoring",
    stage_seconds=20.0,
    rows=12.4,
    num_rows=72,
    seconds_left=96.1,
    tokens=4000,
    tokens_through=6360.0,
    passes=3,
    wait_seconds=4.0,
    compute_seconds=16.0,
    bytes_read={"disk": 24_000_000_000},
    resident_bytes=1 << 30,
)
BEFORE = replace(
    SAMPLE,
    seconds=25.0,
    stage_seconds=15.0,
    wait_seconds=1.95,
    compute_seconds=13.05,
    bytes_read={"disk": 18_000_000_000},
)
WINDOW = Window(BEFORE, SAMPLE)


def console(**options: Any) -> Console:
    return Console(file=io.StringIO(), width=200, **options)


def said(console: Console) -> str:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def at(seconds: float) -> Window:
    now = replace(SAMPLE, seconds=seconds)
    return Window(now, now)


def test_a_line_says_how_far_how_fast_and_what_binds() -> None:
    out = console()
    PlainLines(out)(WINDOW)
    assert said(out) == (
        "penstock: scoring for 20.0 s, 12/72 rows, 318.0 tokens/s, disk 1.20 GB/s, "
        "bound by disk (waiting 41%), 1:36 left\n"
    )


def test_while_it_loads_there_is_no_speed() -> None:
    out = console()
    loading = replace(SAMPLE, stage="loading", stage_seconds=3.0)
    PlainLines(out)(Window(loading, loading))
    assert said(out) == "penstock: loading for 3.0 s\n"


def test_what_does_not_wait_is_bound_by_compute() -> None:
    out = console()
    before = replace(BEFORE, wait_seconds=SAMPLE.wait_seconds)
    PlainLines(out)(Window(before, SAMPLE))
    assert "bound by compute" in said(out)


def test_json_is_one_object_a_line_however_narrow_the_console() -> None:
    out = Console(file=io.StringIO(), width=20)
    for _ in range(2):
        JsonLines(out)(WINDOW)
    found = [json.loads(line) for line in said(out).splitlines()]
    assert len(found) == 2
    assert found[0]["rows"] == 12.4
    assert found[0]["bytes_read"] == {"disk": 24_000_000_000}
    assert found[0]["bytes_per_second"] == {"disk": 1.2e9}
    assert found[0]["waiting"] == pytest.approx(0.41)
    assert found[0]["tokens_per_second"] == 318.0
    assert found[0]["seconds_left"] == pytest.approx(96.1, rel=0.01)


def test_a_bar_has_a_line_for_each_stage() -> None:
    out = console(force_terminal=True, color_system=None)
    with JobBar(out) as bar:
        loading = replace(SAMPLE, stage="loading")
        bar(Window(loading, loading))
        assert said(out) == ""
        bar(WINDOW)
        bar._bar.refresh()
    shown = said(out)
    assert "✓ loading  10.0 s" in shown
    assert "12/72 rows, 318.0 tokens/s, disk 1.20 GB/s" in shown
    assert "ETA 1:36" in shown


def test_a_listener_is_told_once_in_an_interval() -> None:
    told: list[float] = []
    every = Every(30.0, lambda window: told.append(window.now.seconds))
    for seconds in (0.0, 1.0, 29.0, 30.5, 31.0, 60.0, 60.6, 200.0):
        every(at(seconds))
    every.finish(at(201.0))
    assert told == [30.5, 60.6, 200.0], "what takes less than that is quiet"


def test_an_eager_one_is_told_at_once_and_at_the_end() -> None:
    told: list[float] = []
    every = Every(5.0, lambda window: told.append(window.now.seconds), is_eager=True)
    for seconds in (0.0, 1.0, 5.0):
        every(at(seconds))
    every.finish(at(6.0))
    assert told == [0.0, 5.0, 6.0]


@pytest.mark.usefixtures("no_leaks")
def test_a_monitor_looks_until_it_is_closed_and_once_more() -> None:
    ticks: Iterator[int] = iter(range(10_000))
    has_looked = threading.Event()
    seen: list[Window] = []

    def look() -> ResourceSample:
        return replace(SAMPLE, seconds=float(next(ticks)))

    def listen(window: Window) -> None:
        seen.append(window)
        if len(seen) > 8:
            has_looked.set()

    monitor = Monitor(look, [listen], interval=lambda seconds: 0.0)
    monitor.start()
    assert has_looked.wait(60)
    monitor.close()
    num = len(seen)
    monitor.close()
    assert len(seen) == num
    assert [w.now.seconds for w in seen] == [float(i) for i in range(num)]
    assert seen[-1].now.seconds - seen[-1].before.seconds == 5.0


def test_the_longer_a_job_takes_the_more_seldom_it_is_looked_at() -> None:
    assert [interval_seconds(s) for s in (0, 60, 120, 240, 1e6)] == [
        0.25,
        0.25,
        0.5,
        1.0,
        1.0,
    ]


def test_a_window_ends_where_a_stage_begins() -> None:
    samples = [
        replace(SAMPLE, seconds=float(i), stage="loading" if i < 2 else "scoring")
        for i in range(4)
    ]
    left = iter(samples)
    seen: list[Window] = []
    monitor = Monitor(lambda: next(left), [seen.append])
    for _ in samples:
        monitor.tick()
    assert [w.before.seconds for w in seen] == [0.0, 0.0, 2.0, 2.0]


@pytest.mark.usefixtures("no_leaks")
def test_who_cannot_tell_is_told_no_more_and_the_job_goes_on(
    caplog: pytest.LogCaptureFixture,
) -> None:
    seen: list[Window] = []
    has_looked = threading.Event()

    def fail(window: Window) -> None:
        raise OutputError("cannot write x.prom: no space left")

    def listen(window: Window) -> None:
        seen.append(window)
        if len(seen) > 2:
            has_looked.set()

    monitor = Monitor(lambda: SAMPLE, [fail, listen], interval=lambda seconds: 0.0)
    monitor.start()
    assert has_looked.wait(60)
    monitor.close()
    (failure,) = monitor.failures
    assert "no space left" in failure
    assert caplog.text.count("no space left") == 1


@pytest.mark.usefixtures("no_leaks")
def test_a_look_that_fails_is_the_last(caplog: pytest.LogCaptureFixture) -> None:
    def look() -> ResourceSample:
        raise RuntimeError("changed size during iteration")

    monitor = Monitor(look, [], interval=lambda seconds: 0.0)
    monitor.start()
    monitor.close()
    assert set(monitor.failures) == {
        "the progress of this job is no longer shown: changed size during iteration"
    }
    assert "changed size" in caplog.text


# Prometheus.


def metrics_in(path: Path) -> dict[str, float]:
    return {
        sample.name + (f" {tier}" if (tier := sample.labels.get("tier")) else ""): (
            sample.value
        )
        for family in text_string_to_metric_families(path.read_text())
        for sample in family.samples
    }


def test_metrics_are_what_prometheus_reads(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "job.prom"
    MetricsFile(path, {"model": 'a "model"\n', "output": "o"})(WINDOW)
    found = metrics_in(path)
    assert found["penstock_read_bytes_total disk"] == 24e9
    assert found["penstock_tokens_total"] == 4000
    assert found["penstock_wait_seconds_total"] == 4.0
    assert found["penstock_rows_done"] == 12.4
    assert found["penstock_rows"] == 72
    assert found["penstock_resident_memory_bytes"] == 1 << 30
    assert "penstock_device_memory_bytes" not in found
    (family, *_) = text_string_to_metric_families(path.read_text())
    assert family.samples[0].labels["model"] == 'a "model"\n'
    assert [p.name for p in path.parent.iterdir()] == ["job.prom"], "in one piece"


def test_metrics_have_a_gpus_memory_where_there_is_one(tmp_path: Path) -> None:
    path = tmp_path / "job.prom"
    now = replace(SAMPLE, device_bytes=77, num_rows=None)
    MetricsFile(path, {})(Window(now, now))
    found = metrics_in(path)
    assert found["penstock_device_memory_bytes"] == 77
    assert "penstock_rows" not in found


def test_metrics_have_what_the_first_rank_counts_where_there_are_ranks(
    tmp_path: Path,
) -> None:
    path = tmp_path / "job.prom"
    MetricsFile(path, {})(WINDOW)
    assert not any("rank" in name for name in metrics_in(path))
    now = replace(SAMPLE, num_ranks=2, rank_wait_seconds=1.5, rank_bytes_sent=4096)
    MetricsFile(path, {})(Window(now, now))
    found = metrics_in(path)
    assert found["penstock_ranks"] == 2
    assert found["penstock_rank_wait_seconds_total"] == 1.5
    assert found["penstock_rank_sent_bytes_total"] == 4096


def test_metrics_that_cannot_be_say_why(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UsageError, match=r"job\.txt: node_exporter reads files"):
        MetricsFile(tmp_path / "job.txt", {})
    (tmp_path / "file").write_text("")
    metrics = MetricsFile(tmp_path / "file" / "job.prom", {})
    with pytest.raises(OutputError, match="cannot write"):
        metrics(WINDOW)
    monkeypatch.setitem(sys.modules, "prometheus_client", None)
    with pytest.raises(UsageError, match=r"pip install 'penstock\[metrics\]'"):
        MetricsFile(tmp_path / "job.prom", {})


# A job.


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models") / "tiny"
    return make_checkpoint(path, "tiny", dtype="float32", shards_of="100KB")


def job(folder: Path, tmp_path: Path, **watching: Any) -> Job:
    source = tmp_path / "in.jsonl"
    rows = [{"id": i, "text": f"Row {i} of a few, all alike."} for i in range(12)]
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return Job(
        Score(),
        folder,
        source,
        tmp_path / "out.jsonl",
        Policy(
            device_memory="320KiB",
            gather_rows=1000,
            resident_below=10,
            tokens_in_flight=64,
            micro_batch_tokens=32,
        ),
        tmp_path / "report",
        watching=Watching(**watching),
    )


@pytest.mark.slow
@pytest.mark.usefixtures("no_leaks")
def test_a_job_reports_in_pictures_numbers_and_metrics(
    folder: Path, tmp_path: Path
) -> None:
    out = console()
    watched = job(folder, tmp_path, log_json=True, metrics=tmp_path / "j.prom")
    report = watched.run(out).report
    assert report is not None
    lines = [json.loads(line) for line in said(out).splitlines()]
    assert lines[0]["stage"] == "loading"
    assert lines[-1]["stage"] == "scoring"
    assert lines[-1]["tokens"] == report["tokens"]
    assert lines[-1]["rows"] == report["rows"] == 12
    found = metrics_in(tmp_path / "j.prom")
    assert found["penstock_tokens_total"] == report["tokens"]
    assert found["penstock_passes_total"] == report["passes"]
    assert report["bound_by"] == report["bound"]["by"]
    assert report["fallbacks"] == []
    assert report["roofline"]["tokens_per_pass"] == report["tokens"] / report["passes"]
    assert json.loads((tmp_path / "report" / "report.json").read_text())["asked"]
    page = (tmp_path / "report" / "report.html").read_text()
    assert "What bound it?" in page
    events = json.loads((tmp_path / "report" / "trace.json").read_text())["traceEvents"]
    computed = [e for e in events if e["ph"] == "X" and e["cat"] == "compute"]
    assert len({e["name"] for e in computed}) * report["passes"] == len(computed)
    assert all(e["ts"] >= 0 for e in events if "ts" in e)


@pytest.mark.slow
@pytest.mark.usefixtures("no_leaks")
def test_metrics_that_cannot_be_written_stop_a_job_before_it_begins(
    folder: Path, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="cannot write"):
        job(folder, tmp_path, metrics=tmp_path / "file" / "j.prom").run(console())
    assert not (tmp_path / "out.jsonl").exists()


def test_rows_that_are_done_before_those_in_front_of_them_count() -> None:
    """Results come in the input's order; how far a job is does not wait for that."""
    scoring = ScoreProgress(rows_done=2, rows_computed=30.0, rows_in_flight=8.0)
    assert scoring.rows_through(0.5) == 34.0
    assert ScoreProgress(tokens_done=10, tokens_in_flight=6).tokens_through(0.5) == 13
    generating = GenerateProgress(
        rows_done=2,
        rows_computed=30,
        rows_in_flight=8,
        output_tokens=350,
        max_new_tokens=10,
    )
    assert generating.rows_through(0.0) == 35.0
    generating.output_tokens = 100  # many were short
    assert generating.rows_through(0.0) == 30.0

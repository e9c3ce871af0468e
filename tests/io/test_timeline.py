"""What is recorded of a run: a bounded ring of spans, in lanes."""

from __future__ import annotations

import threading
from itertools import pairwise
from typing import Any

import pytest
import torch

import penstock
from nets import PAGE, Net, batches, make, streamed
from penstock.io.handle import Handle
from penstock.io.kv.worker_stream import WorkerStream
from penstock.io.timeline import Span, Timeline, busy_seconds, in_turn
from penstock.offload.model import engine_of


def span(start: float, end: float, lane: str = "disk", nbytes: int = 0) -> Span:
    return Span(lane, f"{start}-{end}", start, end, nbytes)


def test_only_the_last_spans_are_kept() -> None:
    timeline = Timeline(max_spans=3)
    for start in range(5):
        timeline.record("compute", f"{start}", start, start + 1)
    assert [s.name for s in timeline.spans()] == ["3", "4"]
    assert repr(timeline) == "<Timeline: 3/3 spans>"


def test_what_began_before_the_ring_does_is_left_out() -> None:
    """Its companions of that time are forgotten: it would stand alone."""
    timeline = Timeline(max_spans=3)
    for start, end in ((0, 1), (5, 6), (2, 7), (7, 8)):
        timeline.record("compute", f"{start}", start, end)
    assert [s.name for s in timeline.spans()] == ["7"]


def test_a_ring_that_was_never_full_has_all_of_them_by_their_start() -> None:
    timeline = Timeline(max_spans=10)
    for start, end in ((3, 4), (0, 1), (0, 5)):
        timeline.record("compute", f"{start}-{end}", start, end)
    assert [s.name for s in timeline.spans()] == ["0-5", "0-1", "3-4"]


def test_a_link_is_busy_in_turn_however_early_it_was_asked() -> None:
    found = in_turn([span(0, 2), span(0, 5), span(1, 3), span(6, 7)])
    assert [(s.start_seconds, s.end_seconds) for s in found] == [
        (0, 2),
        (2, 3),
        (3, 5),
        (6, 7),
    ]


@pytest.mark.parametrize(
    ("spans", "expected"),
    [
        ([], 0),
        ([span(1, 3)], 2),
        ([span(1, 3), span(2, 4)], 3),
        ([span(1, 9), span(2, 4), span(10, 11)], 9),
    ],
)
def test_what_overlaps_is_busy_once(spans: list[Span], expected: float) -> None:
    assert busy_seconds(spans) == expected


@pytest.mark.usefixtures("no_leaks")
def test_threads_record_while_another_reads() -> None:
    timeline = Timeline(max_spans=64)
    is_over = threading.Event()

    def write() -> None:
        while not is_over.is_set():
            timeline.record("compute", "a", 1.0, 2.0)

    threads = [threading.Thread(target=write) for _ in range(2)]
    for thread in threads:
        thread.start()
    try:
        assert all(len(timeline.spans()) <= 64 for _ in range(200))
    finally:
        is_over.set()
        for thread in threads:
            thread.join()


def test_who_asks_is_told_once_all_parts_are_done() -> None:
    told: list[int] = []
    handle = Handle(2)
    handle.when_done(lambda: told.append(1))
    handle.done()
    assert not told
    handle.done(ValueError("broken"))
    assert told == [1]
    handle.when_done(lambda: told.append(2))
    assert told == [1, 2]


@pytest.mark.usefixtures("no_leaks")
def test_a_courier_that_only_waits_does_no_work() -> None:
    timeline = Timeline(max_spans=9)
    ticks = iter(range(100))
    with WorkerStream(
        "kv-out",
        max_pending_bytes=100,
        clock=lambda: float(next(ticks)),
        record=timeline.record,
    ) as courier:
        courier.wait(courier.record())
        courier.give(lambda: None, 7).wait()
    assert [(s.lane, s.nbytes) for s in timeline.spans()] == [("kv-out", 7)]


def lanes_of(model: Any) -> dict[str, list[Span]]:
    found: dict[str, list[Span]] = {}
    for each in engine_of(model).timeline.spans():
        found.setdefault(each.lane, []).append(each)
    return found


@pytest.mark.usefixtures("no_leaks")
def test_a_sweep_records_what_it_computes_waits_for_and_reads() -> None:
    with streamed(make(Net), slots=2) as model:
        with torch.inference_mode(), penstock.sweep(model, width=3) as sweep:
            sweep.map(model, batches(3))
        lanes = lanes_of(model)
        statistics = penstock.statistics(model)
    assert {"compute", "micro-batches", "wait", "disk"} <= set(lanes)
    sites = [s.name for s in lanes["compute"]]
    assert sites == ["embed", *(f"blocks.{i}" for i in range(5)), "head"]
    assert {s.name for s in lanes["micro-batches"]} == {"0", "1", "2"}
    assert {s.name for s in lanes["disk"]} >= set(sites)
    # The last window ends past the end of the file.
    nbytes = sum(s.nbytes for s in lanes["disk"])
    assert 0 <= nbytes - statistics.bytes_read["disk"] < PAGE
    waits = sum(s.seconds for s in lanes["wait"])
    assert waits == pytest.approx(statistics.wait_seconds)
    assert statistics.max_in_flight == 3


@pytest.mark.usefixtures("no_leaks")
def test_what_is_used_where_it_lies_is_not_waited_for() -> None:
    with streamed(make(Net), host_memory="1MiB") as model:
        with torch.inference_mode(), penstock.sweep(model, width=2) as sweep:
            sweep.map(model, batches(2))
        lanes = lanes_of(model)
    assert len(lanes["compute"]) == 7
    assert "wait" not in lanes


@pytest.mark.usefixtures("no_leaks")
def test_nothing_computes_while_it_waits() -> None:
    with streamed(make(Net), slots=2) as model:
        with torch.inference_mode(), penstock.sweep(model, width=2) as sweep:
            sweep.map(model, batches(4))
        lanes = lanes_of(model)
    turns = sorted(
        [*lanes["compute"], *lanes["wait"]], key=lambda s: (s.start_seconds, s.seconds)
    )
    for one, other in pairwise(turns):
        assert one.end_seconds <= other.start_seconds


@pytest.mark.usefixtures("no_leaks")
def test_plain_calls_are_recorded_too() -> None:
    with streamed(make(Net), slots=2) as model:
        with torch.inference_mode():
            model(batches(1)[0])
        lanes = lanes_of(model)
    assert len(lanes["compute"]) == 7
    assert "micro-batches" not in lanes


@pytest.mark.usefixtures("no_leaks")
def test_statistics_can_be_asked_for_from_another_thread_while_it_runs() -> None:
    """Each count only ever grows, and nothing breaks."""
    seen: list[tuple[int, float, int]] = []
    is_over = threading.Event()
    failed: list[BaseException] = []

    def watch(model: Any) -> None:
        try:
            while not is_over.is_set():
                s = penstock.statistics(model)
                seen.append((s.passes, s.compute_seconds, s.bytes_read["disk"]))
        except BaseException as error:
            failed.append(error)

    with streamed(make(Net), slots=2) as model:
        thread = threading.Thread(target=watch, args=(model,))
        thread.start()
        try:
            for _ in range(5):
                with torch.inference_mode(), penstock.sweep(model, width=3) as sweep:
                    sweep.map(model, batches(6))
        finally:
            is_over.set()
            thread.join()
    assert not failed
    assert len(seen) > 1
    for one, other in pairwise(seen):
        assert all(a <= b for a, b in zip(one, other, strict=True))

"""trace.json, held to the rules of the trace event format."""

from __future__ import annotations

import json
from itertools import pairwise
from typing import Any

import pytest

import runs
from penstock.io.timeline import Span
from penstock.offload.reports.perfetto import trace
from penstock.offload.reports.recorded import Recorded


@pytest.fixture
def found() -> dict[str, Any]:
    made: dict[str, Any] = json.loads(json.dumps(trace("a model", runs.recorded())))
    return made


def test_each_rank_is_a_process() -> None:
    found = trace("a model", runs.of_ranks())
    named = [e for e in of_kind(found, "M") if e["name"] == "process_name"]
    assert {event["pid"]: event["args"]["name"] for event in named} == {
        1: "a model, rank 0",
        2: "a model, rank 1 on a-machine",
    }
    other = [e for e in of_kind(found, "X") if e["pid"] == 2]
    assert {e["cat"] for e in other} == {"compute", "micro-batches", "ranks", "disk"}
    assert min(event["ts"] for event in other) == pytest.approx(2e6)


def of_kind(found: dict[str, Any], kind: str) -> list[dict[str, Any]]:
    return [event for event in found["traceEvents"] if event["ph"] == kind]


def test_every_event_has_what_its_kind_needs(found: dict[str, Any]) -> None:
    assert found["displayTimeUnit"] in ("ms", "ns")
    for event in found["traceEvents"]:
        assert isinstance(event["name"], str)
        assert isinstance(event["pid"], int)
        assert isinstance(event["tid"], int)
        assert isinstance(event["args"], dict)
        assert event["ph"] in ("X", "C", "M")
        if event["ph"] == "M":
            known = ("process_name", "thread_name", "thread_sort_index")
            assert event["name"] in known
        else:
            assert event["ts"] >= 0
        if event["ph"] == "X":
            assert event["dur"] >= 0
            assert isinstance(event["cat"], str)
        if event["ph"] == "C":
            assert event["args"]
            assert all(isinstance(v, (int, float)) for v in event["args"].values())


def test_each_lane_is_a_thread_with_a_name_computing_first(
    found: dict[str, Any],
) -> None:
    metadata = of_kind(found, "M")
    named = [e for e in metadata if e["name"] == "thread_name"]
    lanes = {event["tid"]: event["args"]["name"] for event in named}
    assert list(lanes.values()) == ["compute", "micro-batches", "wait", "cast", "disk"]
    order = {
        event["tid"]: event["args"]["sort_index"]
        for event in metadata
        if event["name"] == "thread_sort_index"
    }
    assert sorted(order, key=lambda tid: order[tid]) == list(lanes)
    assert {event["tid"] for event in of_kind(found, "X")} == set(lanes)
    assert all(lanes[e["tid"]] == e["cat"] for e in of_kind(found, "X"))
    assert metadata[0]["args"]["name"] == "a model"


def test_spans_of_one_thread_do_not_overlap(found: dict[str, Any]) -> None:
    """The format wants them nested, and a link does one thing after the other."""
    for thread in {event["tid"] for event in of_kind(found, "X")}:
        events = [e for e in of_kind(found, "X") if e["tid"] == thread]
        for one, other in pairwise(sorted(events, key=lambda e: (e["ts"], e["dur"]))):
            assert one["ts"] + one["dur"] <= other["ts"] + 0.01


def test_times_are_microseconds_since_the_job_began() -> None:
    span = Span("disk", "a", runs.BEGAN + 0.5, runs.BEGAN + 0.75, 1_000_000_000)
    (event,) = of_kind(trace("m", Recorded(runs.BEGAN, [span], [])), "X")
    assert (event["ts"], event["dur"]) == (500_000.0, 250_000.0)
    assert event["args"] == {"bytes": 1_000_000_000, "GB_per_second": 4.0}


def test_memory_and_tokens_are_counters(found: dict[str, Any]) -> None:
    counters = of_kind(found, "C")
    assert {event["name"] for event in counters} == {"memory", "tokens"}
    memory = [
        event["args"]["process"] for event in counters if "process" in event["args"]
    ]
    assert memory == [sample.resident_bytes for sample in runs.samples()]

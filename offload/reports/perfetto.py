"""Converts a recorded timeline to trace events, for ui.perfetto.dev and
chrome://tracing. Pure.

The format: "Trace Event Format", Google 2016 (complete events `X`, counters `C`,
metadata `M`; times in microseconds).
"""

from collections.abc import Iterable
from typing import Any

from ...io.tier import Tier
from ...io.timeline import COMPUTE, MICRO_BATCHES, RANKS, Span, in_turn
from .recorded import Recorded, by_lane

_PID = 1
_FIRST = (
    *(COMPUTE, MICRO_BATCHES, "wait", RANKS),
    *("cast", Tier.DISK, "staging", Tier.HOST),
)


def trace(title: str, recorded: Recorded) -> dict[str, Any]:
    """The content of trace.json: a process for each rank, a thread for each of its
    lanes, and counters from the samples. The job begins at time 0."""
    name = f"{title}, rank 0" if recorded.others else title
    events = _process(_PID, name, recorded.spans, recorded.began_seconds)
    for other in recorded.others:
        name = f"{title}, rank {other.rank} on {other.host}"
        pid = _PID + other.rank
        events += _process(pid, name, other.spans, recorded.began_seconds)
    events += _counters(recorded)
    return {"traceEvents": events, "displayTimeUnit": "ms"}


def _process(
    pid: int, title: str, spans: Iterable[Span], began: float
) -> list[dict[str, Any]]:
    """The events of one process."""
    lanes = by_lane(spans)
    names = sorted(lanes, key=lambda lane: (_place(lane), lane))
    events = [_named("process_name", 0, pid, name=title)]
    for thread, lane in enumerate(names, 1):
        events.append(_named("thread_name", thread, pid, name=lane))
        events.append(_named("thread_sort_index", thread, pid, sort_index=thread))
        # Events of one thread must not overlap unless they nest.
        for span in in_turn(lanes[lane]):
            if span.end_seconds >= began:
                events.append(_complete(span, thread, pid, began))
    return events


def _place(lane: str) -> int:
    return _FIRST.index(lane) if lane in _FIRST else len(_FIRST)


def _named(kind: str, thread: int, pid: int, **args: Any) -> dict[str, Any]:
    return {"ph": "M", "name": kind, "pid": pid, "tid": thread, "args": args}


def _complete(span: Span, thread: int, pid: int, began: float) -> dict[str, Any]:
    start = _micros(max(span.start_seconds - began, 0.0))
    args: dict[str, float] = {"bytes": span.nbytes} if span.nbytes else {}
    if span.nbytes and span.seconds:
        args["GB_per_second"] = round(span.nbytes / span.seconds / 1e9, 3)
    return {
        "ph": "X",
        "name": span.name,
        "cat": span.lane,
        "pid": pid,
        "tid": thread,
        "ts": start,
        "dur": round(_micros(span.end_seconds - began) - start, 3),
        "args": args,
    }


def _counters(recorded: Recorded) -> list[dict[str, Any]]:
    found = []
    for sample in recorded.samples:
        memory = {"process": sample.resident_bytes}
        if sample.device_bytes is not None:
            memory["device"] = sample.device_bytes
        for name, values in (("memory", memory), ("tokens", {"done": sample.tokens})):
            found.append(
                {
                    "ph": "C",
                    "name": name,
                    "pid": _PID,
                    "tid": 0,
                    "ts": _micros(sample.seconds),
                    "args": values,
                }
            )
    return found


def _micros(seconds: float) -> float:
    return round(seconds * 1e6, 3)

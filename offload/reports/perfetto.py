"""Converts a recorded timeline to trace events, for ui.perfetto.dev and
chrome://tracing. Pure.

The format: "Trace Event Format", Google 2016 (complete events `X`, counters `C`,
metadata `M`; times in microseconds).
"""

from typing import Any

from ...io.timeline import COMPUTE, MICRO_BATCHES, Span, in_turn
from .recorded import Recorded, by_lane

_PID = 1
_FIRST = (COMPUTE, MICRO_BATCHES, "wait", "cast", "disk", "staging", "host")


def trace(title: str, recorded: Recorded) -> dict[str, Any]:
    """The content of trace.json: a thread for each lane, and counters from the samples.
    The job begins at time 0."""
    lanes = by_lane(recorded.spans)
    names = sorted(lanes, key=lambda lane: (_place(lane), lane))
    events = [_named("process_name", 0, name=title)]
    for thread, lane in enumerate(names, 1):
        events.append(_named("thread_name", thread, name=lane))
        events.append(_named("thread_sort_index", thread, sort_index=thread))
        # Events of one thread must not overlap unless they nest.
        for span in in_turn(lanes[lane]):
            events.append(_complete(span, thread, recorded.began_seconds))
    events += _counters(recorded)
    return {"traceEvents": events, "displayTimeUnit": "ms"}


def _place(lane: str) -> int:
    return _FIRST.index(lane) if lane in _FIRST else len(_FIRST)


def _named(kind: str, thread: int, **args: Any) -> dict[str, Any]:
    return {"ph": "M", "name": kind, "pid": _PID, "tid": thread, "args": args}


def _complete(span: Span, thread: int, began: float) -> dict[str, Any]:
    start = _micros(span.start_seconds - began)
    args: dict[str, float] = {"bytes": span.nbytes} if span.nbytes else {}
    if span.nbytes and span.seconds:
        args["GB_per_second"] = round(span.nbytes / span.seconds / 1e9, 3)
    return {
        "ph": "X",
        "name": span.name,
        "cat": span.lane,
        "pid": _PID,
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

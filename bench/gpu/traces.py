"""Reads the traces of torch's profiler: waits of the host, and how kernels and copies
lie beside each other. Uses only the standard library."""

import gzip
import json
import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

MARK = "penstock: two passes"
WAIT = re.compile(
    r"[a-z]+(Stream|Device|Event|Ctx|CommandQueue|Fence|EventHost)Synchronize"
    r"|[a-z]+(Memcpy|Memcpy2D|Memset|Malloc|Free|FreeHost|HostAlloc|HostFree|HostMalloc"
    r"|HostRegister|HostUnregister|EventWait|QueueFinish)(_v2)?"
)
"""Calls of the runtimes of CUDA, ROCm, XPU and the simulated GPU that make the host
wait."""
RUNTIMES = ("_runtime", "_driver")
_HOST_TO_DEVICE = re.compile(r"HtoD|HostToDevice|H2D|M2D")
MAIN, OTHERS = "main thread", "others"

Span = tuple[float, float]
Event = dict[str, Any]


def read(path: Path, names: Mapping[int | None, str]) -> dict[str, Any]:
    """The figures of a trace: those of the host between the beginning and the end of
    the mark, those of the device from the mark's beginning on.

    `names` gives the threads' names by their numbers in the system.
    """
    open_it = gzip.open if path.suffix == ".gz" else open
    with open_it(path, "rt") as file:
        events = [e for e in json.load(file)["traceEvents"] if e.get("ph") == "X"]
    mark = next(e for e in events if e["name"] == MARK and "gpu" not in e["cat"])
    return {**_host(events, mark, names), **_device(events, mark)}


def _host(
    events: list[Event], mark: Event, names: Mapping[int | None, str]
) -> dict[str, Any]:
    start, end, main = mark["ts"], mark["ts"] + mark["dur"], mark["tid"]
    waits: dict[str, Counter[str]] = {MAIN: Counter(), OTHERS: Counter()}
    seconds = {MAIN: 0.0, OTHERS: 0.0}
    by_thread: Counter[str] = Counter()
    for event in events:
        is_wait = event["cat"].endswith(RUNTIMES) and WAIT.fullmatch(event["name"])
        if not is_wait or not start <= event["ts"] < end:
            continue
        who = MAIN if event["tid"] == main else OTHERS
        waits[who][event["name"]] += 1
        seconds[who] += event["dur"] / 1e6
        by_thread[names.get(event["tid"], str(event["tid"]))] += 1
    return {
        "waits": {who: dict(found) for who, found in waits.items()},
        "waits_seconds": seconds,
        "waits_by_thread": dict(by_thread),
        "main_thread_waits": sum(waits[MAIN].values()),
        "host_seconds": (end - start) / 1e6,
    }


def _device(events: list[Event], mark: Event) -> dict[str, Any]:
    since = [e for e in events if e["ts"] >= mark["ts"]]
    copies = [e for e in since if e["cat"] == "gpu_memcpy"]
    kernels = _union([_span(e) for e in since if e["cat"] == "kernel"])
    moving = _union([_span(e) for e in copies if _HOST_TO_DEVICE.search(e["name"])])
    whole = _length(_union(kernels + moving))
    both = _length(kernels) + _length(moving) - whole
    # Between the first and the last kernel: what do the products wait for?
    window = (kernels[0][0], kernels[-1][1]) if kernels else (0.0, 0.0)
    inside = _length(_union(kernels + _within(moving, window)))
    length = window[1] - window[0]
    return {
        "copies": dict(Counter(e["name"] for e in copies)),
        "pageable_copies": sum("Pageable" in e["name"] for e in copies),
        "kernel_seconds": _length(kernels) / 1e6,
        "h2d_seconds": _length(moving) / 1e6,
        "h2d_seconds_beside_kernels": both / 1e6,
        "device_busy_seconds": whole / 1e6,
        "kernels_wait_seconds": (length - _length(kernels)) / 1e6,
        "kernels_wait_for_copies_seconds": (inside - _length(kernels)) / 1e6,
        "kernels_wait_for_host_seconds": (length - inside) / 1e6,
    }


def _span(event: Event) -> Span:
    return event["ts"], event["ts"] + event["dur"]


def _within(spans: list[Span], window: Span) -> list[Span]:
    cut = [(max(start, window[0]), min(end, window[1])) for start, end in spans]
    return [(start, end) for start, end in cut if start < end]


def _union(spans: list[Span]) -> list[Span]:
    found: list[Span] = []
    for start, end in sorted(spans):
        if found and start <= found[-1][1]:
            found[-1] = (found[-1][0], max(found[-1][1], end))
        else:
            found.append((start, end))
    return found


def _length(spans: list[Span]) -> float:
    return sum(end - start for start, end in spans)

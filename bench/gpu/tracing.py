"""Traces two passes in their steady state with torch's profiler: who waits for the
device, and how much copying overlaps with kernels.

The thread that runs the model must never wait for the device. Waiting means calls of
the runtime that synchronise, and copies that are not asynchronous, between the start
and the end of the two passes.

Takes at most 50 seconds; needs a GPU with 20 GB, and 40 GB of host memory.
"""

import gzip
import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from gpu.common import Part, lacking
from gpu.rig import hidden_states, open_rig
from gpu.shapes import Shape, shape_of

MARK = "penstock: two passes"
WAITS = frozenset(
    (
        "cudaStreamSynchronize",
        "cudaDeviceSynchronize",
        "cudaEventSynchronize",
        "cudaMemcpy",
        "cudaMemcpy2D",
        "cudaMemset",
        "cudaMalloc",
        "cudaFree",
        "cuStreamSynchronize",
        "cuCtxSynchronize",
        "cuEventSynchronize",
    )
)

Span = tuple[float, float]


def record(part: Part, path: Path, two_passes: Callable[[], object]) -> dict[str, Any]:
    """Runs `two_passes` once to warm up, and once under the profiler."""
    two_passes()
    part.synchronize()
    activities = [ProfilerActivity.CPU]
    if part.has_cuda:
        activities.append(ProfilerActivity.CUDA)
    with profile(activities=activities) as profiler:
        with record_function(MARK):
            two_passes()
        part.synchronize()
    profiler.export_chrome_trace(str(path))
    return {**read(path), "trace": path.name}


def read(path: Path) -> dict[str, Any]:
    """The figures of a trace that `record` has written."""
    open_it = gzip.open if path.suffix == ".gz" else open
    with open_it(path, "rt") as file:
        events = [e for e in json.load(file)["traceEvents"] if e.get("ph") == "X"]
    mark = next(e for e in events if e["name"] == MARK and "gpu" not in e["cat"])
    start, end, main = mark["ts"], mark["ts"] + mark["dur"], mark["tid"]
    waits: dict[str, Counter[str]] = {"main thread": Counter(), "others": Counter()}
    seconds = {"main thread": 0.0, "others": 0.0}
    for event in events:
        if event["name"] in WAITS and start <= event["ts"] < end:
            who = "main thread" if event["tid"] == main else "others"
            waits[who][event["name"]] += 1
            seconds[who] += event["dur"] / 1e6
    kernels = _union([_span(e) for e in events if e["cat"] == "kernel"])
    copies = [e for e in events if e["cat"] == "gpu_memcpy" and "HtoD" in e["name"]]
    moving = _union([_span(e) for e in copies])
    whole = _length(_union(kernels + moving))
    both = _length(kernels) + _length(moving) - whole
    return {
        "waits": {who: dict(found) for who, found in waits.items()},
        "waits_seconds": seconds,
        "main_thread_waits": sum(waits["main thread"].values()),
        "target": 0,
        "pageable_copies": sum("Pageable" in e["name"] for e in copies),
        "kernel_seconds": _length(kernels) / 1e6,
        "h2d_seconds": _length(moving) / 1e6,
        "h2d_seconds_beside_kernels": both / 1e6,
        "device_busy_seconds": whole / 1e6,
        "host_seconds": (end - start) / 1e6,
    }


def _span(event: dict[str, Any]) -> Span:
    return event["ts"], event["ts"] + event["dur"]


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


def of_rig(part: Part, shape: Shape, num_layers: int) -> dict[str, Any]:
    with torch.inference_mode(), open_rig(part, shape, num_layers, 3) as rig:
        states = hidden_states(part, shape, 4)

        def two_passes() -> None:
            rig.run(rig.run(states))

        return record(part, part.kept / "trace_rig.json.gz", two_passes)


def of_sweep(part: Part, shape: Shape, num_layers: int) -> dict[str, Any]:
    import penstock
    from gpu.api import LOGITS_BYTES, streamed
    from gpu.shapes import token_ids
    from penstock.offload.tasks.head import CausalScorer

    with streamed(part, shape, num_layers, num_slots=3) as model:
        scorer = CausalScorer(model, max_logits_bytes=LOGITS_BYTES)
        batches = [ids.to(part.device) for ids in token_ids(shape, 8)]

        def two_passes() -> None:
            with penstock.sweep(model, width=4) as sweep:
                sweep.map(lambda ids: scorer.log_probabilities(ids, None), batches)

        return record(part, part.kept / "trace_sweep.json.gz", two_passes)


def main() -> None:
    part = Part("tracing", __doc__)
    shape = shape_of(part.is_dry)
    layers = 5 if part.is_dry else 8
    part.attempt("rig", lambda: of_rig(part, shape, layers))
    if (reason := lacking()) is not None:
        part.put(sweep=reason)
    else:
        part.attempt("sweep", lambda: of_sweep(part, shape, layers))


if __name__ == "__main__":
    main()

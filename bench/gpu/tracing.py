"""Traces two passes in their steady state with torch's profiler: who waits for whom,
and how much copying overlaps with kernels.

The thread that runs the model must never wait for the device. Waiting means calls of
the runtime that synchronise, and copies that are not asynchronous, between the start
and the end of the two passes.

Takes at most 55 seconds; needs a GPU with 20 GB, and 40 GB of host memory.
"""

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.profiler import profile, record_function, supported_activities

from gpu import traces
from gpu.common import Part, lacking
from gpu.rig import hidden_states, open_rig
from gpu.shapes import Shape, shape_of


def record(part: Part, path: Path, two_passes: Callable[[], object]) -> dict[str, Any]:
    """Runs `two_passes` once to warm up, and once under the profiler."""
    two_passes()
    part.synchronize()
    activities = supported_activities()  # type: ignore[no-untyped-call]
    with profile(activities=activities) as profiler:
        with record_function(traces.MARK):
            two_passes()
        part.synchronize()
    names = {thread.native_id: thread.name for thread in threading.enumerate()}
    profiler.export_chrome_trace(str(path))
    return {**traces.read(path, names), "trace": path.name}


def of_rig(part: Part, shape: Shape, num_layers: int) -> dict[str, Any]:
    with (
        torch.no_grad(),
        open_rig(part, shape, num_layers, part.number(3, 2)) as rig,
    ):
        states = hidden_states(part, shape, part.number(4, 2))

        def two_passes() -> None:
            rig.run(rig.run(states))

        found = record(part, part.kept / "trace_rig.json.gz", two_passes)
        return {**found, "target": 0}


def of_sweep(part: Part, shape: Shape, num_layers: int) -> dict[str, Any]:
    import penstock
    from gpu.api import LOGITS_BYTES
    from gpu.models import streamed
    from gpu.shapes import token_ids
    from penstock.offload.tasks.head import CausalScorer

    with streamed(part, shape, num_layers, num_slots=3) as model:
        scorer = CausalScorer(model, max_logits_bytes=LOGITS_BYTES)
        batches = [ids.to(part.device) for ids in token_ids(shape, part.number(8, 2))]

        def two_passes() -> None:
            with penstock.sweep(model, width=len(batches) // 2) as sweep:
                sweep.map(lambda ids: scorer.log_probabilities(ids, None), batches)

        found = record(part, part.kept / "trace_sweep.json.gz", two_passes)
        return {
            **found,
            # transformers asks whether several texts were packed into a row.
            "main_thread_waits_each": found["main_thread_waits"] / len(batches),
            "target": "one for each micro-batch, at its beginning",
        }


def main() -> None:
    part = Part("tracing", __doc__)
    shape = shape_of(part.is_dry)
    layers = part.number(8, 4)
    part.attempt("rig", lambda: of_rig(part, shape, layers))
    part.give_back()
    if (reason := lacking()) is not None:
        part.put(sweep=reason)
    else:
        part.attempt("sweep", lambda: of_sweep(part, shape, layers))


if __name__ == "__main__":
    main()

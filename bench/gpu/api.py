"""Streams and scores through Penstock's public API: a checkpoint, hooks, a sweep, a
scorer.

Takes at most 95 seconds; needs a GPU with 20 GB, and 90 GB of host memory for all
blocks (with less it has fewer).
"""

import time
from functools import partial
from typing import Any

import penstock
from gpu.common import Part
from gpu.models import streamed
from gpu.shapes import Shape, block_flops, shape_and_layers, token_ids
from penstock.offload.tasks.head import CausalScorer

IN_FLIGHT = (8, 2)
"""Micro-batches, in order of importance."""
LOGITS_BYTES = 1 << 30


def score(part: Part, model: Any, shape: Shape, num: int) -> dict[str, Any]:
    """Scores `num` micro-batches in one sweep, twice; the second time is measured, if
    there is time for it."""
    scorer = CausalScorer(model, max_logits_bytes=LOGITS_BYTES)
    num = part.number(num, 1 + num // 8)
    batches = [ids.to(part.device) for ids in token_ids(shape, num)]

    def act() -> dict[str, Any]:
        before, start = penstock.statistics(model), time.perf_counter()
        with penstock.sweep(model, width=num) as sweep:
            sweep.map(lambda ids: scorer.log_probabilities(ids, None), batches)
        part.synchronize()
        seconds, after = time.perf_counter() - start, penstock.statistics(model)
        moved = {
            tier: nbytes - before.bytes_read.get(tier, 0)
            for tier, nbytes in after.bytes_read.items()
        }
        return {
            "seconds": seconds,
            "passes": after.passes - before.passes,
            "bytes_moved": moved,
            "bytes_moved_per_second": sum(moved.values()) / seconds,
            "wait_seconds": after.wait_seconds - before.wait_seconds,
        }

    part.synchronize()
    found, is_first = act(), True
    if not part.is_dry and found["seconds"] < part.seconds_left / 3:
        found, is_first = act(), False
    tokens = num * shape.micro_batch_tokens
    layers = model.config.num_hidden_layers
    parameters = layers * shape.layer_parameters + shape.hidden * shape.vocabulary
    return {
        "tokens_in_flight": tokens,
        "tokens_per_second": tokens / found["seconds"],
        "flops_per_second": 2.0 * parameters * tokens / found["seconds"],
        **found,
        "is_first_run": is_first,
    }


def main() -> None:
    part = Part("api", __doc__)
    shape, layers = shape_and_layers(part.is_dry)
    flops = block_flops(part, shape)
    part.put(
        level="penstock's build, sweep and scorer; one stored block, named many times",
        num_layers=layers,
        matmul_flops_per_second=flops,
        targets={"of_matmul_rate": 0.60},
    )
    part.give_back()
    start = time.perf_counter()
    with streamed(part, shape, layers) as model:
        statistics = penstock.statistics(model)
        part.put(
            load_seconds=time.perf_counter() - start,
            weights_bytes=statistics.model_bytes,
            bytes_by_tier=dict(statistics.bytes_by_tier),
            fallbacks=list(statistics.fallbacks),
        )
        for num in IN_FLIGHT:
            found = part.attempt(
                f"in_flight_{num}", partial(score, part, model, shape, num)
            )
            if found is not None:
                share = found["flops_per_second"] / flops
                part.put(**{f"in_flight_{num}": {**found, "of_matmul_rate": share}})
        part.put(
            peak_device_bytes=part.peak_bytes(),
            peak_host_bytes=penstock.statistics(model).peak_host_bytes,
            faults=dict(penstock.statistics(model).faults),
        )


if __name__ == "__main__":
    main()

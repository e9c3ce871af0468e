"""Measures streaming from pinned host memory, with link, working set and sites: how
fast weights arrive alone, and while computing.

A pass is bound by the matrix products or by the link, whichever takes longer. Both are
measured here, on the same blocks, in turns with what they bound.

Takes at most 85 seconds; needs a GPU with 12 GB, and 54 GB of host memory for all
blocks (with less it has fewer).
"""

import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from gpu.common import Part
from gpu.rig import Rig, hidden_states, open_rig
from gpu.shapes import FEWER_BYTES, Shape, block_flops, shape_and_layers

NUM_SLOTS = 4
IN_FLIGHT = (8, 1, 4)
"""The numbers of micro-batches in flight: bound by matrix products, bound by the link,
and near the balance. In order of importance."""
ROUNDS = 3


def timed(part: Part, rig: Rig, act: Callable[[], object]) -> tuple[float, int]:
    """(seconds of `act`, bytes that the link moved meanwhile)."""
    before = rig.link.statistics().bytes_moved
    start = time.perf_counter()
    act()
    part.synchronize()
    seconds = time.perf_counter() - start
    return seconds, rig.link.statistics().bytes_moved - before


def alone(part: Part, rig: Rig) -> dict[str, Any]:
    """Measures the link without computing, compared with a simple loop of copies of as
    many bytes."""
    target = torch.empty(rig.unit_bytes, dtype=torch.uint8, device=part.device)
    nbytes = rig.unit_bytes * len(rig.layers)
    link, plain, moved = [], [], []
    rig.stream()
    part.synchronize()
    for _ in range(part.number(ROUNDS, 1)):
        seconds, bytes_moved = timed(part, rig, rig.stream)
        link.append(bytes_moved / seconds)
        moved.append(bytes_moved)
        plain.append(nbytes / timed(part, rig, lambda: rig.plain(target))[0])
    return {
        "link_bytes_per_second": statistics.median(link),
        "plain_bytes_per_second": statistics.median(plain),
        "of_plain": statistics.median(a / b for a, b in zip(link, plain, strict=True)),
        "target": 0.97,
        "bytes_moved_per_pass": statistics.median(moved),  # units that fit stay
        "bytes_of_all_units": nbytes,
    }


def computing(part: Part, rig: Rig, shape: Shape, num: int) -> dict[str, Any]:
    """Runs `num` micro-batches, streamed and with weights that stay, in turns."""
    num = part.number(num, 1 + num // 8)
    states = hidden_states(part, shape, num)
    seconds, moved, stays = [], [], []
    rig.run(states)
    rig.stay(states)
    part.synchronize()
    waited = rig.working_set.wait_seconds
    for _ in range(part.number(2, 1)):
        found = timed(part, rig, lambda: rig.run(states))
        seconds.append(found[0])
        moved.append(found[1])
        stays.append(timed(part, rig, lambda: rig.stay(states))[0])
    tokens = num * shape.micro_batch_tokens
    flops = 2.0 * shape.layer_parameters * len(rig.layers) * tokens
    return {
        "tokens_in_flight": tokens,
        "seconds_per_pass": statistics.median(seconds),
        "compute_seconds": statistics.median(stays),
        "bytes_moved_per_pass": statistics.median(moved),
        "flops_per_second": flops / statistics.median(seconds),
        "host_wait_seconds": rig.working_set.wait_seconds - waited,
        "tokens_per_second": tokens / statistics.median(seconds),
    }


def is_equal(part: Part, rig: Rig, shape: Shape) -> bool:
    states = hidden_states(part, shape, 2)
    pairs = zip(rig.run(states), rig.reference(states), strict=True)
    return all(torch.equal(one, other) for one, other in pairs)


def judge(
    part: Part, rig: Rig, shape: Shape, num: int, link: dict[str, Any], flops: float
) -> dict[str, Any]:
    """The result of `computing`, and its shares of the ceilings."""
    found = computing(part, rig, shape, num)
    transfer = found["bytes_moved_per_pass"] / link["plain_bytes_per_second"]
    bound = max(found["compute_seconds"], transfer)
    return {
        **found,
        "transfer_seconds": transfer,
        "of_max_of_compute_and_transfer": bound / found["seconds_per_pass"],
        "of_matmul_rate": found["flops_per_second"] / flops,
        "bound_by": "link" if transfer > found["compute_seconds"] else "compute",
    }


def main() -> None:
    part = Part("streaming", __doc__)
    shape, layers = shape_and_layers(part.is_dry, FEWER_BYTES)
    flops = block_flops(part, shape)
    part.put(
        level="link, working set, sites, binding; transformers' own blocks; no files",
        num_layers=layers,
        matmul_flops_per_second=flops,
        targets={"of_matmul_rate": 0.60, "of_max_of_compute_and_transfer": 0.97},
    )
    part.give_back()
    start = time.perf_counter()
    slots = part.number(NUM_SLOTS, 2)
    with torch.no_grad(), open_rig(part, shape, layers, slots) as rig:
        part.put(
            load_seconds=time.perf_counter() - start,
            weights_bytes=layers * rig.unit_bytes,
            working_set_bytes=rig.memory.nbytes,
            not_pinned=rig.fallback,
        )
        same = part.attempt("bit_identical", lambda: is_equal(part, rig, shape))
        found = part.attempt("alone", lambda: alone(part, rig))
        in_flight = IN_FLIGHT[: part.number(3, 2)]
        for num in in_flight if found is not None else ():
            part.attempt(
                f"in_flight_{num}",
                partial(judge, part, rig, shape, num, found, flops),
            )
        part.put(peak_device_bytes=part.peak_bytes())
    if same is False:
        sys.exit("streamed blocks differ from resident ones")


if __name__ == "__main__":
    main()

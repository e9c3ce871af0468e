"""Scores with weights in each tier, and generates with keys and values in each.

What comes from another tier must be the same, bit for bit: of scores the log-
probabilities, of generation the tokens.

The blocks are those of an 8B model. Takes at most 70 seconds; needs a GPU with 20 GB,
20 GB of host memory, 2 GB of a real drive, and a second GPU for the tier `peer`.
"""

import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch

import penstock
from gpu.common import Part
from gpu.models import checkpoint_folder, host_bytes, opened, settings
from gpu.shapes import EIGHT_B, TINY, Shape, token_ids
from penstock import Policy
from penstock.offload.tasks.head import CausalScorer

_LOGITS_BYTES = 1 << 28
_BLOCKS = r"layers\."


def size(part: Part) -> tuple[int, int]:
    """How many blocks the model has, and how many are on the device at one time."""
    return part.number(12, 4), part.number(4, 3)


def policies(part: Part, shape: Shape) -> dict[str, dict[str, Any] | str]:
    """By tier, what a policy has in place of the host's; or why it is left out."""
    rest, disk = {"": "device"}, {"cache": part.work}
    layers, slots = size(part)
    peer: dict[str, Any] | str = "skipped: there is one accelerator"
    if part.peer is not None:
        memory = {str(part.peer): host_bytes(shape, layers)}
        peer = {"placement": {_BLOCKS: "peer"} | rest, "peer": memory}
    memory_bytes = settings(part, shape, layers, slots + 1)["device_memory"]
    mixed = {r"layers\.0": "device", r"layers\.[12]": "host", _BLOCKS: "disk"}
    return {
        "host": {},
        "disk": {"placement": {_BLOCKS: "disk"} | rest, "io": disk},
        "peer": peer,
        "mixed": {"device_memory": memory_bytes, "placement": mixed | rest, "io": disk},
    }


def scores(
    part: Part, folder: Path, shape: Shape, values: dict[str, Any]
) -> tuple[dict[str, Any], list[torch.Tensor]]:
    """The figures of a pass, the second one, and the log-probabilities of both passes
    (on the CPU)."""
    layers, slots = size(part)
    base = settings(part, shape, layers, slots)
    with opened(folder, shape, layers, Policy(**(base | values))) as model:
        scorer = CausalScorer(model, max_logits_bytes=_LOGITS_BYTES)
        batches = [ids.to(part.device) for ids in token_ids(shape, 2)]
        found = []
        with penstock.sweep(model) as sweep:
            for ids in batches:
                part.synchronize()
                before, start = penstock.statistics(model), time.perf_counter()
                found += sweep.map(
                    lambda ids: scorer.log_probabilities(ids, None), [ids]
                )
                part.synchronize()
                seconds = time.perf_counter() - start
        after = penstock.statistics(model)
        moved = {
            tier: nbytes - before.bytes_read.get(tier, 0)
            for tier, nbytes in after.bytes_read.items()
        }
        figures = {
            "seconds": seconds,
            "bytes_moved": moved,
            "moved_bytes_per_second": sum(moved.values()) / seconds,
            "wait_seconds": after.wait_seconds - before.wait_seconds,
            "bytes_by_tier": dict(after.bytes_by_tier),
            "fallbacks": list(after.fallbacks),
        }
        return figures, [tensor.cpu() for tensor in found]


def weights(part: Part, folder: Path, shape: Shape) -> None:
    expected: list[torch.Tensor] = []

    def run(values: dict[str, Any]) -> dict[str, Any]:
        figures, found = scores(part, folder, shape, values)
        if not expected:
            expected.extend(found)
        figures["is_equal"] = all(map(torch.equal, found, expected))
        return figures

    for name, values in policies(part, shape).items():
        if isinstance(values, str):
            part.put(**{f"weights_{name}": values})
        else:
            part.attempt(f"weights_{name}", partial(run, values))


def generation(part: Part, folder: Path, shape: Shape) -> None:
    length, num_new = part.number(128, 6), part.number(8, 2)
    prompts = [
        ids[:, :length].to(part.device) for ids in token_ids(shape, part.number(4, 2))
    ]
    expected: list[torch.Tensor] = []

    def run(kv: dict[str, Any], key: str) -> dict[str, Any]:
        policy = Policy(**settings(part, shape, *size(part)), kv=kv)
        with opened(folder, shape, size(part)[0], policy) as model:

            def complete(ids: torch.Tensor) -> torch.Tensor:
                found: torch.Tensor = model.generate(
                    input_ids=ids,
                    attention_mask=torch.ones_like(ids),
                    max_new_tokens=num_new,
                    do_sample=False,
                    pad_token_id=0,
                )
                return found

            with penstock.sweep(model) as sweep:
                start = time.perf_counter()
                outputs = sweep.map(complete, prompts)
                part.synchronize()
                seconds = time.perf_counter() - start
            found = [ids.cpu() for ids in outputs]
            statistics = penstock.statistics(model)
        if not expected:
            expected.extend(found)
        num = sum(ids.shape[0] * (ids.shape[1] - length) for ids in found)
        return {
            "seconds": seconds,
            "new_tokens_per_second": num / seconds,
            key: all(map(torch.equal, found, expected)),
            "kv_bytes_written": dict(statistics.kv.bytes_written),
            "fallbacks": list(statistics.fallbacks),
        }

    for tier in ("auto", "device", "host", "disk"):
        part.attempt(f"kv_{tier}", partial(run, {"tier": tier}, "is_equal"))
    # The CPU's attention has other last bits, which may change a token.
    host = {"tier": "host", "attention": "host"}
    part.attempt("attention_on_host", partial(run, host, "has_the_same_tokens"))


def main() -> None:
    part = Part("tiers", __doc__)
    shape = TINY if part.is_dry else EIGHT_B
    part.give_back()
    with checkpoint_folder(part, shape, in_memory=False) as folder:
        part.put(num_layers=size(part)[0], layer_bytes=shape.layer_bytes)
        weights(part, folder, shape)
        generation(part, folder, shape)
    part.put(peak_device_bytes=part.peak_bytes())
    different = [
        name
        for name, value in part.figures.items()
        if isinstance(value, dict) and not value.get("is_equal", True)
    ]
    part.put(all_equal=not different and "is_equal" in str(part.figures))
    if different:
        sys.exit(f"not the same, bit for bit: {', '.join(different)}")


if __name__ == "__main__":
    main()

"""Compares experts that are loaded as the router chooses them with whole layers.

A model of routed experts (64, of which 4 are chosen for a token) runs one token of
1 to 256 sequences in a working set of less than half of the model: once with units of
experts, once with units of whole layers, which were all that earlier versions had. Both
take turns. Medians of the seconds are shown, with what noise cannot move: the bytes
read in a pass, and those of the experts that tokens needed. A pass should read at most
1.1 times these, and with 256 sequences, which need all experts, take no longer.

    python bench/experts.py [--rounds 7] [--bandwidth 500MB]

`--bandwidth` limits the drive. The last line of the output is one JSON object.

Takes about two minutes; needs 0.4 GB of disk in this folder and 2 GB of memory.
"""

from __future__ import annotations

import statistics
import sys
import time
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

import penstock
from common import frame
from penstock import Policy
from penstock.offload.units.division import Divider

EXPERTS, CHOSEN, WIDTH, LAYERS = 64, 4, 512, 4
PASSES = 3
SEQUENCES = (1, 8, 64, 256)
WAYS = ("experts", "layers")


def main() -> int:
    parser = frame.parser(__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--bandwidth", help="of the drive, such as 500MB a second")
    parser.add_argument("--device-memory", default="160MiB")
    args = parser.parse_args()
    policy: dict[str, Any] = {"device_memory": args.device_memory}
    if args.bandwidth:
        policy["links"] = {"disk": {"bandwidth": args.bandwidth}}
    with frame.scratch(parent=frame.BENCH) as folder:
        make(folder)
        models = {way: load(folder, way, policy) for way in WAYS}
        found = [compare(models, num, args.rounds) for num in SEQUENCES]
        for model in models.values():
            penstock.unwrap(model)
    for one in found:
        print(
            f"{one['sequences']:4} sequences: {one['seconds']['experts']:.3f} s by "
            f"experts, {one['seconds']['layers']:.3f} by layers; "
            f"{one['read_over_needed']:.2f} of the needed bytes read, "
            f"{one['bytes']['layers'] / 1e6:.0f} MB by layers"
        )
    return frame.finish(found, is_good=all(one["is_equal"] for one in found))


def make(folder: Path) -> None:
    """Writes a checkpoint of random weights in bfloat16."""
    values: dict[str, Any] = {
        "vocab_size": 1000,
        "hidden_size": WIDTH,
        "intermediate_size": 2 * WIDTH,
        "moe_intermediate_size": 384,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "head_dim": 64,
        "num_experts": EXPERTS,
        "num_experts_per_tok": CHOSEN,
    }
    torch.manual_seed(0)
    model = Qwen3MoeForCausalLM(Qwen3MoeConfig(**values)).bfloat16()
    model.save_pretrained(folder)


def load(folder: Path, way: str, policy: dict[str, Any]) -> Any:
    """The model, streamed in units of `way`."""
    if way == "experts":
        return penstock.load(folder, Policy(**policy))
    with patch.object(Divider, "stacks", {}):
        return penstock.load(folder, Policy(**policy))


def compare(models: dict[str, Any], sequences: int, rounds: int) -> dict[str, Any]:
    """Passes of one token of each sequence, by all `models` in turn."""
    generator = torch.Generator().manual_seed(sequences)
    ids = torch.randint(3, 999, (sequences, 1), generator=generator)
    seconds: dict[str, list[float]] = {way: [] for way in models}
    nbytes: dict[str, list[float]] = {way: [] for way in models}
    needed: list[float] = []
    logits = {}
    for _ in frame.progress(range(rounds + 1), f"{sequences} sequences"):
        for way, model in models.items():
            with torch.inference_mode():
                # The other model still loads for its next pass during this one.
                model(input_ids=ids, use_cache=False)
                before, start = penstock.statistics(model), time.perf_counter()
                for _ in range(PASSES):
                    logits[way] = model(input_ids=ids, use_cache=False).logits
                seconds[way].append((time.perf_counter() - start) / PASSES)
            after = penstock.statistics(model)
            read = after.bytes_read["disk"] - before.bytes_read["disk"]
            nbytes[way].append(read / PASSES)
            if way == "experts":
                touched = after.expert_bytes_touched - before.expert_bytes_touched
                needed.append(touched / PASSES)
    of_pass = {way: statistics.median(each[1:]) for way, each in nbytes.items()}
    experts = statistics.median(needed[1:])
    return {
        "sequences": sequences,
        "seconds": {way: statistics.median(s[1:]) for way, s in seconds.items()},
        "bytes": of_pass,
        "needed_bytes": experts,
        "read_over_needed": of_pass["experts"] / experts,
        "is_equal": bool(torch.equal(logits["experts"], logits["layers"])),
    }


if __name__ == "__main__":
    sys.exit(main())

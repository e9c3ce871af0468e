"""Measures the memory that two hundred random policies take and allow, with one model.

    python bench/budgets.py [--policies 200]

The kernel's peak (VmHWM, reset before each policy), minus what was resident before, is
compared with the sum of the budgets: working set, host tier, peers, staging and bounce
buffers. In addition, the model's own code needs memory while it computes, which is
measured once with the resident model, and Python's objects take some. Logits are
compared with those of the resident model. The last line is one JSON object; the exit
code is 1 if a policy took more.

Takes about ten minutes; needs Linux (/proc) and 1 GB of memory.
"""

from __future__ import annotations

import gc
import statistics
import sys
from pathlib import Path
from random import Random
from typing import Any

import psutil
import torch
from transformers import AutoModelForCausalLM

import penstock
from common import frame, models
from penstock import Policy
from penstock.io.errors import PolicyError
from penstock.offload.model import engine_of
from penstock.offload.monitoring.memory import peak_resident_bytes

MIB = 1 << 20
SLACK_BYTES = 32 * MIB
"""Bytes for the Python objects of a model, and for gaps in the heap."""


SHAPE: dict[str, Any] = {
    "hidden_size": 512,
    "intermediate_size": 1408,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "vocab_size": 4096,
}


def random_policy(random: Random) -> Policy:
    values: dict[str, Any] = {
        "device_memory": random.randrange(40, 130) * MIB,
        "lookahead": random.randrange(4),
        "activations": random.choice(["device", "host"]),
        "io": {"threads": random.randrange(1, 4), "bounce": "1MiB"},
        "links": {
            tier: {"bandwidth": "50GB"}
            for tier in ("peer", "host", "disk")
            if random.random() < 0.4
        },
    }
    if random.random() < 0.6:
        values["host_memory"] = random.randrange(1, 100) * MIB
    if random.random() < 0.6:
        values["peer"] = {"cpu": random.randrange(1, 100) * MIB}
    if random.random() < 0.3:
        values["dtype"] = "bfloat16"
    return Policy(**values)


def allowed_bytes(policy: Policy, model: Any) -> int:
    """The bytes that the policy allows for weights."""
    assert isinstance(policy.device_memory, int)
    tiers = engine_of(model)._tiers
    largest = max(plan.nbytes for plan in tiers._layouts)
    staging = 3 * largest if "disk" in policy.links or tiers.peers else 0
    host = policy.host_memory or 0
    return (
        policy.device_memory
        + (host if tiers.host is not None else 0)
        + sum(peer.memory.nbytes for peer in tiers.peers)
        + staging * (1 + bool(tiers.peers))
        + 2 * policy.io.bounce
    )


def reset_peak() -> int:
    """Resets the peak, and returns the bytes that are resident now."""
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")
    return int(psutil.Process().memory_info().rss)


def run(model: Any, batches: list[torch.Tensor]) -> list[torch.Tensor]:
    with penstock.sweep(model, width=len(batches)) as sweep:
        return sweep.map(lambda ids: model(ids, use_cache=False).logits, batches)


def main() -> int:
    parser = frame.parser(__doc__)
    parser.add_argument("--policies", type=int, default=200)
    args = parser.parse_args()
    batches = list(torch.randint(5, 4096, (3, 2, 32)))
    over: list[int] = []
    num_different = num_refused = 0
    with frame.scratch() as folder, torch.inference_mode():
        models.llama(folder, **SHAPE)
        expected = {}
        for dtype in ("float32", "bfloat16"):
            resident = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
            before = reset_peak()
            expected[dtype] = [resident(x, use_cache=False).logits for x in batches]
            own = max(peak_resident_bytes() - before, 0)
            del resident
        for seed in frame.progress(range(args.policies), "policies"):
            policy = random_policy(Random(seed))
            before = reset_peak()
            try:
                with penstock.load(folder, policy) as model:
                    found = run(model, batches)
                    taken = peak_resident_bytes() - before
                    over.append(taken - allowed_bytes(policy, model))
            except PolicyError:
                num_refused += 1
                continue
            wanted = expected["bfloat16" if policy.dtype == "bfloat16" else "float32"]
            num_different += any(
                not torch.equal(a, b) for a, b in zip(found, wanted, strict=True)
            )
            del found, model
    limit = own + SLACK_BYTES
    result: dict[str, Any] = {
        "policies": len(over),
        "refused": num_refused,
        "num_different": num_different,
        "own_bytes": own,
        "over_budget_bytes": {"median": statistics.median(over), "most": max(over)},
        "is_kept": max(over) <= limit and num_different == 0,
    }
    return frame.finish(result, is_good=result["is_kept"])


if __name__ == "__main__":
    sys.exit(main())

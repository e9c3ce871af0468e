"""Runs ten thousand passes over a small model whose weights are in all four tiers;
nothing may grow.

    python bench/soak.py [--passes 10000]

Every pass is a sweep of three micro-batches, whose logits are compared with those of
the first pass. Resident memory, Python's objects, threads and descriptors are counted
twenty times; the first tenth is the warm-up. The last line is one JSON object; the exit
code is 1 if something grew or differed.

Takes ten to twenty minutes; needs Linux (descriptors are counted in /proc).
"""

from __future__ import annotations

import gc
import sys
import threading
import time
from pathlib import Path
from typing import Any

import psutil
import torch

import penstock
from common import frame, models
from penstock import Policy
from penstock.offload.model import engine_of

MAX_GROWTH_BYTES = 4 << 20
"""Bytes that resident memory may grow after the warm-up: the noise of the heap."""


SHAPE: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 8,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 256,
}


def policy() -> Policy:
    """Two blocks in each tier. The slots hold two of the six blocks that come over
    links."""
    return Policy(
        device_memory=800_000,
        host_memory=1 << 20,
        peer={"cpu": 1 << 20},
        resident_below=1,
        placement={
            r"layers\.[04]$": "device",
            r"layers\.[15]$": "peer",
            r"layers\.[26]$": "host",
            ".": "disk",
        },
        links={"host": {"bandwidth": "10GiB"}},
    )


def counts() -> dict[str, int]:
    gc.collect()
    process = psutil.Process()
    return {
        "resident_bytes": int(process.memory_info().rss),
        "objects": len(gc.get_objects()),
        "threads": threading.active_count(),
        "descriptors": process.num_fds(),
    }


def soak(folder: Path, passes: int) -> dict[str, Any]:
    ids = [torch.arange(start, start + 12).view(2, 6) for start in (0, 40, 80)]
    samples: list[dict[str, int]] = []
    num_different = 0
    start = time.perf_counter()
    with penstock.load(folder, policy()) as model, torch.inference_mode():

        def run() -> list[Any]:
            with penstock.sweep(model, width=len(ids)) as sweep:
                return sweep.map(lambda x: model(x, use_cache=False).logits, ids)

        expected = run()
        for number in frame.progress(range(passes), "passes"):
            found = run()
            num_different += any(
                not torch.equal(a, b) for a, b in zip(found, expected, strict=True)
            )
            if number % max(passes // 20, 1) == 0:
                samples.append(counts())
        after = penstock.statistics(model)
        links = engine_of(model)._tiers.links
        copies = {link.tier: link.statistics().num_copies for link in links}
    warm = samples[len(samples) // 10]
    growth = {key: samples[-1][key] - warm[key] for key in warm}
    return {
        "passes": after.passes,
        "seconds": time.perf_counter() - start,
        "num_different": num_different,
        "warm": warm,
        "growth": growth,
        "largest_resident_bytes": max(sample["resident_bytes"] for sample in samples),
        "bytes_read": dict(after.bytes_read),
        "copies": copies,
        "is_flat": growth["resident_bytes"] <= MAX_GROWTH_BYTES
        and all(growth[key] <= 0 for key in ("threads", "descriptors"))
        and growth["objects"] < passes // 100
        and num_different == 0,
    }


def main() -> int:
    parser = frame.parser(__doc__)
    parser.add_argument("--passes", type=int, default=10_000)
    args = parser.parse_args()
    torch.set_num_threads(1)  # the matrix products are tiny
    with frame.scratch() as folder:
        models.llama(folder, max_shard_size="300KB", **SHAPE)
        found = soak(folder, args.passes)
    for key, value in found.items():
        print(f"{key:24} {value}")
    return frame.finish(found, is_good=found["is_flat"])


if __name__ == "__main__":
    sys.exit(main())

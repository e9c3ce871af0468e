"""One run of `bench/stream.py`, in a process of its own: streamed or resident. Prints
one JSON object, with the keys of the peers' scripts.

Takes minutes for thousands of tokens; needs what `bench/stream.py` gives it.
"""

import argparse
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"  # set before it is imported
os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # as the command line does
sys.path.append(str(Path(__file__).resolve().parents[1]))

import torch
from transformers import AutoModelForCausalLM

import penstock
from common import frame
from penstock import Policy
from penstock.offload.model import engine_of
from penstock.offload.monitoring.memory import peak_resident_bytes
from penstock.offload.tasks.head import CausalScorer

_LOGITS_BYTES = 64 << 20


def score(scorer: CausalScorer, ids: torch.Tensor) -> list[float]:
    return [float(row.double().sum()) for row in scorer.log_probabilities(ids, None)]


def streamed(args: argparse.Namespace, batches: list[torch.Tensor]) -> dict[str, Any]:
    policy = Policy(device_memory=args.device_memory, dtype=args.dtype)
    start = time.perf_counter()
    with penstock.load(args.model, policy) as model:
        scorer = CausalScorer(model, max_logits_bytes=_LOGITS_BYTES)
        loaded, used = time.perf_counter(), time.process_time()
        with penstock.sweep(model, width=len(batches)) as sweep:
            sums = sweep.map(lambda ids: score(scorer, ids), batches)
        seconds = time.perf_counter() - loaded
        cpu_seconds = time.process_time() - used
        found = penstock.statistics(model)
        first = engine_of(model).first_unit_at or loaded
    return {
        "load_seconds": loaded - start,
        "seconds": seconds,
        "cpu_seconds": cpu_seconds,
        "seconds_to_first_layer": first - start,
        "bytes_loaded": found.bytes_loaded,
        "bytes_gathered": found.bytes_gathered,
        "bytes_copied": found.bytes_copied,
        "disk_read_bytes": found.bytes_read["disk"],
        "wait_seconds": found.wait_seconds,
        "passes": found.passes,
        "fallbacks": list(found.fallbacks),
        "logprob_sums": [value for rows in sums for value in rows],
    }


def resident(args: argparse.Namespace, batches: list[torch.Tensor]) -> dict[str, Any]:
    start = time.perf_counter()
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=args.dtype)
    model.train(False)
    scorer = CausalScorer(model, max_logits_bytes=_LOGITS_BYTES)
    for parameter in model.parameters():  # mapped files load when touched
        parameter.data = parameter.data.clone()
    loaded, used = time.perf_counter(), time.process_time()
    with torch.inference_mode():
        sums = [value for ids in batches for value in score(scorer, ids)]
    return {
        "load_seconds": loaded - start,
        "seconds": time.perf_counter() - loaded,
        "cpu_seconds": time.process_time() - used,
        "logprob_sums": sums,
    }


def main() -> int:
    parser = frame.parser(__doc__)
    parser.add_argument("mode", choices=("streamed", "resident"))
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--tokens", type=Path, required=True)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--device-memory", default="1GiB")
    args = parser.parse_args()
    source = json.loads(args.tokens.read_text())["batches"]
    batches = [torch.tensor(batch) for batch in source]
    run = streamed if args.mode == "streamed" else resident
    found = run(args, batches)
    tokens = sum(batch.numel() for batch in batches)
    found["tokens"] = tokens
    found["tokens_per_second"] = tokens / found["seconds"]
    found["peak_rss_bytes"] = peak_resident_bytes()
    found["disk_written_bytes"] = 0
    return frame.finish(found)


if __name__ == "__main__":
    sys.exit(main())

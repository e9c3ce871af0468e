"""One run of `bench/generate.py`, in a process of its own. Prints one JSON object.

Takes minutes for hundreds of sequences; needs what `bench/generate.py` gives it.
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
from common.id_tokenizer import Numbers
from common.padding import padded_left
from penstock import Policy
from penstock.offload.monitoring.memory import peak_resident_bytes
from penstock.offload.tasks.task_progress import GenerateProgress


def options(work: dict[str, Any]) -> dict[str, Any]:
    if work["ends"]:  # greedy: the lengths are the same for all contenders
        penalty = 2.0  # without it, greedy completions repeat and never end
        return {
            "eos_token_id": work["ends"],
            "do_sample": False,
            "repetition_penalty": penalty,
        }
    return {"do_sample": False}


def streamed(args: argparse.Namespace, work: dict[str, Any]) -> dict[str, Any]:
    policy = Policy(dtype=args.dtype).with_settings(args.set)
    rows = [
        {"id": n, "prompt": " ".join(map(str, p))}
        for n, p in enumerate(work["prompts"])
    ]
    size = len(rows) if args.mode == "streamed" else policy.sequences_in_flight
    progress = GenerateProgress()
    start = time.perf_counter()
    with penstock.load(args.model, policy) as model:
        loaded, used = time.perf_counter(), time.process_time()
        found = [
            result
            for first in range(0, len(rows), size)
            for result in penstock.generate(
                model,
                rows[first : first + size],
                max_new_tokens=work["new_tokens"],
                tokenizer=Numbers(),
                progress=progress,
                **options(work),
            )
        ]
        seconds = time.perf_counter() - loaded
        cpu_seconds = time.process_time() - used
        statistics = penstock.statistics(model)
    return {
        "load_seconds": loaded - start,
        "loaded_at": loaded,
        "seconds": seconds,
        "cpu_seconds": cpu_seconds,
        "output_tokens": progress.output_tokens,
        "passes": statistics.passes,
        "bytes_loaded": statistics.bytes_loaded,
        "wait_seconds": statistics.wait_seconds,
        "kv_wait_seconds": statistics.kv.wait_seconds,
        "fallbacks": list(statistics.fallbacks),
        "completions": [result["completion"] for result in found],
    }


def resident(args: argparse.Namespace, work: dict[str, Any]) -> dict[str, Any]:
    """Completes all prompts as one batch, padded on the left."""
    start = time.perf_counter()
    model: Any = AutoModelForCausalLM.from_pretrained(args.model, dtype=args.dtype)
    model.train(False)
    for parameter in model.parameters():  # mapped files load when touched
        parameter.data = parameter.data.clone()
    loaded, used = time.perf_counter(), time.process_time()
    ids, mask = padded_left(work["prompts"])
    found = model.generate(
        ids,
        attention_mask=mask,
        max_new_tokens=work["new_tokens"],
        do_sample=False,
        pad_token_id=0,
    )[:, ids.shape[1] :]
    return {
        "load_seconds": loaded - start,
        "loaded_at": loaded,
        "seconds": time.perf_counter() - loaded,
        "cpu_seconds": time.process_time() - used,
        "output_tokens": found.numel(),
        "completions": [" ".join(map(str, row)) for row in found.tolist()],
    }


def main() -> int:
    parser = frame.parser(__doc__)
    parser.add_argument("mode", choices=("streamed", "fixed", "resident"))
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--set", nargs="*", default=[])
    args = parser.parse_args()
    work = json.loads(args.work.read_text())
    run = resident if args.mode == "resident" else streamed
    with torch.inference_mode():
        found = run(args, work)
    prompt_tokens = sum(map(len, work["prompts"]))
    found["prompt_tokens"] = prompt_tokens
    found["output_tokens_per_second"] = found["output_tokens"] / found["seconds"]
    found["tokens_per_second"] = (found["output_tokens"] + prompt_tokens) / found[
        "seconds"
    ]
    found["peak_rss_bytes"] = peak_resident_bytes()
    return frame.finish(found)


if __name__ == "__main__":
    sys.exit(main())

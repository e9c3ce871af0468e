"""Complete with transformers and accelerate: one batch of all prompts, weights that do
not fit `--cpu-memory` loaded from disk by accelerate's hooks at every step."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

from peer_common import parser, proc_value


def main() -> None:
    options = parser(__doc__, "accelerate")
    options.add_argument("--model", type=Path, required=True)
    options.add_argument("--work", type=Path, required=True)
    options.add_argument("--dtype", default="float32")
    options.add_argument("--cpu-memory", required=True, help="such as 1GiB")
    options.add_argument("--batch", type=int, help="prompts of a batch (default: all)")
    args = options.parse_args()
    work = json.loads(args.work.read_text())
    import tempfile

    import torch
    from transformers import AutoModelForCausalLM

    from common.padding import padded_left

    with tempfile.TemporaryDirectory(dir=args.model.resolve().parent) as folder:
        start = time.perf_counter()
        model: Any = AutoModelForCausalLM.from_pretrained(
            args.model,
            dtype=getattr(torch, args.dtype),
            device_map="auto",
            max_memory={"cpu": args.cpu_memory},
            offload_folder=folder,
        )
        model.eval()
        loaded, used = time.perf_counter(), time.process_time()
        prompts = work["prompts"]
        size = args.batch or len(prompts)
        completions: list[str] = []
        # Not inference_mode: weights that arrive in it want no gradient, whatever they
        # say. So torch folds no prompts into rows, and in bfloat16 copies the head for
        # each one: 50 times the time.
        with torch.no_grad():
            for first in range(0, len(prompts), size):
                part = prompts[first : first + size]
                ids, mask = padded_left(part)
                found = model.generate(
                    ids,
                    attention_mask=mask,
                    max_new_tokens=work["new_tokens"],
                    do_sample=False,
                    pad_token_id=0,
                )[:, ids.shape[1] :]
                completions += [" ".join(map(str, row)) for row in found.tolist()]
        seconds = time.perf_counter() - loaded
        cpu_seconds = time.process_time() - used
    tokens = len(completions) * work["new_tokens"]
    print(
        json.dumps(
            {
                "load_seconds": loaded - start,
                "loaded_at": loaded,
                "seconds": seconds,
                "cpu_seconds": cpu_seconds,
                "output_tokens": tokens,
                "output_tokens_per_second": tokens / seconds,
                "tokens_per_second": (tokens + sum(map(len, prompts))) / seconds,
                "disk_read_bytes": proc_value("io", "read_bytes"),
                "peak_rss_bytes": proc_value("status", "VmHWM"),
                "completions": completions,
            }
        )
    )


if __name__ == "__main__":
    main()

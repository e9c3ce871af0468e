"""One model on several ranks, each with a drive of its own speed: how much faster?

    python bench/ranks/pipeline_pace.py [--ranks 2] [--rate 50MB] [--pairs 3]
    python bench/ranks/pipeline_pace.py --rate 10GB --sleep 8
    python bench/ranks/pipeline_pace.py --rate 10GB --sleep 100 --ranks 4 --batches 32

Makes a Llama of 24 blocks (330 MB) in `bench/out`. Each process reads its own blocks at
no more than `--rate`, as a drive or a link of its own would give them. One process, and
then `--ranks` of them, complete the same `--batches` prompts, in turns, `--pairs`
times. The ceiling is the number of ranks: bytes of the model / rate / ranks is what the
slowest link takes for a pass. With `--sleep` each block takes so many milliseconds more
for each micro-batch, without using a core: what limits is computing then, as on a slow
processor, and the ceiling is the same. The last line is one JSON object; the exit code
is 1 if the median ratio is below 1.9 for two ranks (0.95 a rank), or tokens differ.

Takes two minutes a pair; needs 0.4 GB of disk in this folder, and two cores that others
leave alone.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parents[1]))

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import penstock
from common import frame
from penstock import Policy
from penstock.offload.model import load_for
from penstock.offload.ranks.joining import RankEnvironment, join
from ranks.rank_processes import run_ranks

OUT = Path(__file__).parents[1] / "out"
BATCHES, ROWS, TOKENS = 8, 1, 8
LEAST = 0.95


def make(folder: Path) -> Path:
    if not (folder / "config.json").exists():
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=512,
            hidden_size=512,
            intermediate_size=1536,
            num_hidden_layers=24,
            num_attention_heads=8,
            num_key_value_heads=4,
            eos_token_id=None,
            pad_token_id=0,
        )
        LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def work(model: Any, num_batches: int, passes: int) -> dict[str, Any]:
    """Completes the prompts. The first pass, which is not timed, fills the slots."""
    generator = torch.Generator().manual_seed(1)
    given = [
        torch.randint(8, 512, (ROWS, TOKENS), generator=generator)
        for _ in range(num_batches)
    ]

    def complete(ids: torch.Tensor) -> list[int]:
        found = model.generate(ids, max_new_tokens=passes, do_sample=False)
        return [int(token) for token in found.flatten()]

    with penstock.sweep(model, width=num_batches, seed=1) as sweep:
        sweep.map(lambda ids: model(ids).logits, given)
        before, start = penstock.statistics(model), time.perf_counter()
        tokens = sweep.map(complete, given)
        seconds = time.perf_counter() - start
    after = penstock.statistics(model)
    read = after.bytes_read["disk"] - before.bytes_read["disk"]
    return {"seconds": seconds, "read": read, "tokens": tokens}


def rank(
    where: RankEnvironment,
    folder: Path,
    policy: Policy,
    num_batches: int,
    passes: int,
    sleep_seconds: float,
) -> dict[str, Any]:
    post = join(where) if where.num_ranks > 1 else None
    if post is None:
        policy = policy.with_settings(["ranks=null"])
    with load_for("any", folder, policy, post) as model:
        for block in model.model.layers:
            if sleep_seconds and "forward" not in vars(block):  # it is this rank's
                block.register_forward_pre_hook(lambda *_: time.sleep(sleep_seconds))
        return work(model, num_batches, passes)


def main() -> int:
    parser = frame.parser(__doc__)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--rate", default="50MB")
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--batches", type=int, default=BATCHES)
    parser.add_argument("--passes", type=int, default=6)
    parser.add_argument("--sleep", type=float, default=0.0, metavar="MS")
    options = parser.parse_args()
    folder = make(OUT / "ranks")
    policy = Policy(
        device_memory="48MiB",
        gather_rows="1KiB",
        ranks="pipeline",
        links={"disk": {"bandwidth": options.rate}},
        io={"reader": "threads", "cache": OUT / "cache"},
    )
    ratios, is_same = [], True
    print("| ranks | seconds | read by each | of the link | times one rank |")
    print("|---|---|---|---|---|")
    rate = policy.links["disk"].bandwidth
    for _ in range(options.pairs):
        counts = (options.batches, options.passes)
        how = (folder, policy, *counts, options.sleep / 1000)
        alone = run_ranks(1, rank, *how)[0]
        shared = run_ranks(options.ranks, rank, *how)
        is_same &= all(one["tokens"] == alone["tokens"] for one in shared)
        seconds = max(one["seconds"] for one in shared)
        ratios.append(alone["seconds"] / seconds)
        for name, found, took in (("1", [alone], alone["seconds"]),
                                  (f"{options.ranks}", shared, seconds)):  # fmt: skip
            read = " + ".join(f"{one['read'] / 1e6:.0f} MB" for one in found)
            share = max(one["read"] for one in found) / rate / took
            times = alone["seconds"] / took
            print(f"| {name} | {took:.2f} | {read} | {share:.0%} | {times:.2f} |")
    median = statistics.median(ratios)
    is_fine = is_same and median >= LEAST * options.ranks
    figures = {"median": median, "ratios": ratios, "same": is_same, "ok": is_fine}
    print(json.dumps(figures))
    return 0 if is_fine else 1


if __name__ == "__main__":
    sys.exit(main())

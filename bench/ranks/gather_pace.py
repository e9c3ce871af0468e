"""Ranks with a drive of their own speed each, that read 1/n of the weights: how much
faster than ranks that each read all of them?

    python bench/ranks/gather_pace.py [--ranks 2] [--rate 50MB] [--pairs 3]

Makes a Llama of 24 blocks (330 MB) in `bench/out`. Each process scores eight
micro-batches of its own, several times, and reads at no more than `--rate`, as a drive
or a link of its own would give it. First one process reads all weights; then `--ranks`
of them read a part each and send it to the others (`ranks: gather`). They take turns,
`--pairs` times. The ceiling is the number of ranks. The last line is one JSON object;
the exit code is 1 if the median ratio is below 1.6 for two ranks (0.8 a rank), if a
rank reads more than its part (and 4096 bytes for each load of a unit), or if logits
differ from those of one process by any bit.

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

import penstock
from common import frame
from penstock import Policy
from penstock.offload.model import engine_of, load_for
from penstock.offload.ranks.joining import RankEnvironment, join
from ranks.pipeline_pace import BATCHES, OUT, make
from ranks.rank_processes import run_ranks

TOKENS = 8
LEAST = 0.8
BLOCK = 4096


def work(model: Any, of_rank: int, passes: int) -> dict[str, Any]:
    """Scores the micro-batches of one rank. The first pass, which is not timed, fills
    the slots."""
    generator = torch.Generator().manual_seed(of_rank)
    given = [
        torch.randint(8, 512, (1, TOKENS), generator=generator) for _ in range(BATCHES)
    ]

    def score(ids: torch.Tensor) -> list[float]:
        for _ in range(passes):
            logits = model(ids).logits
        return [float(one) for one in logits.double().sum(-1).flatten()]

    with torch.no_grad(), penstock.sweep(model, width=BATCHES, seed=1) as sweep:
        sweep.map(lambda ids: model(ids).logits, given)
        before, start = penstock.statistics(model), time.perf_counter()
        sums = sweep.map(score, given)
        seconds = time.perf_counter() - start
    after = penstock.statistics(model)
    read = after.bytes_read["disk"] - before.bytes_read["disk"]
    sent = after.ranks.bytes_sent - before.ranks.bytes_sent
    num_units = len(engine_of(model).model_division.units)
    return {
        "seconds": seconds,
        "read": read,
        "sent": sent,
        "sums": sums,
        "most_padding": num_units * (passes + 1) * BLOCK,
    }


def rank(
    where: RankEnvironment, folder: Path, policy: Policy, passes: int, of_alone: int
) -> dict[str, Any]:
    """What one rank measures; one alone has the rows of `of_alone`."""
    post = join(where) if where.num_ranks > 1 else None
    if post is None:
        policy = policy.with_settings(["ranks=null"])
    with load_for("any", folder, policy, post) as model:
        return work(model, of_alone if post is None else where.rank, passes)


def main() -> int:
    parser = frame.parser(__doc__)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--rate", default="50MB")
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--passes", type=int, default=4)
    options = parser.parse_args()
    folder = make(OUT / "ranks")
    policy = Policy(
        device_memory="48MiB",
        gather_rows="1GiB",
        ranks="gather",
        links={"disk": {"bandwidth": options.rate}},
        io={"reader": "threads", "cache": OUT / "cache"},
    )
    ratios, is_same, is_part = [], True, True
    print("| ranks | seconds | read by each | sent by each | of the link | times |")
    print("|---|---|---|---|---|---|")
    rate = policy.links["disk"].bandwidth
    for pair in range(options.pairs):
        which = pair % options.ranks
        how = (folder, policy, options.passes, which)
        alone = run_ranks(1, rank, *how)[0]
        shared = run_ranks(options.ranks, rank, *how)
        is_same &= shared[which]["sums"] == alone["sums"]
        is_part &= all(
            one["read"] <= alone["read"] / options.ranks + one["most_padding"]
            for one in shared
        )
        seconds = max(one["seconds"] for one in shared)
        ratios.append(alone["seconds"] / seconds)
        for name, found, took in (("1", [alone], alone["seconds"]),
                                  (f"{options.ranks}", shared, seconds)):  # fmt: skip
            read = " + ".join(f"{one['read'] / 1e6:.1f} MB" for one in found)
            sent = " + ".join(f"{one['sent'] / 1e6:.1f} MB" for one in found)
            share = max(one["read"] for one in found) / rate / took
            times = alone["seconds"] / took
            print(
                f"| {name} | {took:.2f} | {read} | {sent} | {share:.0%} | {times:.2f} |"
            )
    median = statistics.median(ratios)
    is_fine = is_same and is_part and median >= LEAST * options.ranks
    figures = {
        "median": median,
        "ratios": ratios,
        "same": is_same,
        "part": is_part,
        "ok": is_fine,
    }
    print(json.dumps(figures))
    return 0 if is_fine else 1


if __name__ == "__main__":
    sys.exit(main())

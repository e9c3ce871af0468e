"""From how many tokens a pass on do two ranks that gather weights get faster than two
that divide products?

    python bench/ranks/switch.py [--network 10MB] [--rate 50MB] [--passes 2]

Makes a Llama of 8 blocks (26 MB) in `bench/out`. Two processes share it, each over a
link of its own to the weights (`--rate` bytes a second) and one to the other process
(`--network`). They score the same tokens, so many of them a pass, twice as many from
row to row: by `ranks: tensor` (all tokens on both ranks, half of each product; outputs
are sent) and by `ranks: gather` (half of the tokens on each; weights are sent). With
few tokens outputs are fewer bytes than weights, with many they are more.

Shows the seconds of a pass of both, and the bytes that a rank sends in it, which have
no noise; the number of tokens at which the faster one changes, measured and as the
planner predicts it; and that of two formulas: bytes of weights over bytes of all
outputs of a token, which is what Penstock sends, and bytes of weights over four hidden
states (arXiv 2211.05102). The model's MLP is as narrow as its hidden states, so both
formulas are near each other. The last line is one JSON object; the exit code is 1 if
the measured number is more than one row (a factor of two) from a formula's or the
planner's, or if the two ways give logits that differ by any bit.

Takes two minutes; needs 0.1 GB of disk in this folder, and two cores that others leave
alone.
"""

from __future__ import annotations

import math
import os
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # as the command line does
sys.path.append(str(Path(__file__).resolve().parents[1]))

import torch

import penstock
from common import frame, models
from penstock import Policy
from penstock.offload.machines.machine import Machine, find_machine
from penstock.offload.machines.part_machine import part_of
from penstock.offload.model import load_for
from penstock.offload.plans.plan import make_plan
from penstock.offload.plans.planned import Workload
from penstock.offload.plans.rank_plans import two_ways
from penstock.offload.plans.ranked import RankGroup, gathering_planner
from penstock.offload.plans.tensor_ranked import tensor_planner
from penstock.offload.ranks.joining import RankEnvironment
from penstock.offload.tasks.score_task import Score
from penstock.scheduler.cost.partitioning import gather_crossover_tokens
from ranks.paced_peers import join_paced
from ranks.rank_processes import run_ranks

OUT = Path(__file__).parents[1] / "out"
RANKS, VOCABULARY, BLOCKS, HIDDEN, WIDE, LENGTH = 2, 512, 8, 384, 384, 16
GRID = tuple(1 << power for power in range(5, 11))
"""Tokens a pass, of all ranks together."""
WAYS = "tensor", "gather"


def make(folder: Path) -> Path:
    if not (folder / "config.json").exists():
        models.llama(
            folder,
            vocab_size=VOCABULARY,
            hidden_size=HIDDEN,
            intermediate_size=WIDE,
            num_hidden_layers=BLOCKS,
            num_attention_heads=6,
            num_key_value_heads=1,
        )
    return folder


def policy_of(way: str, rate: str) -> Policy:
    """A pass is one micro-batch on each rank, however many tokens it has."""
    return Policy(
        ranks=way,
        device_memory="8MiB",
        gather_rows="1KiB",
        micro_batch_tokens=GRID[-1],
        tokens_in_flight=GRID[-1],
        links={"disk": {"bandwidth": rate}},
        io={"reader": "threads", "cache": OUT / "cache"},
    )


def rank(
    where: RankEnvironment, folder: Path, policy: Policy, network: int, passes: int
) -> dict[int, dict[str, Any]]:
    """What passes of each number of tokens take on this rank. The first pass of each,
    which is not timed, fills the slots."""
    found = {}
    post = join_paced(where, network)
    with load_for("any", folder, policy, post) as model, torch.no_grad():
        for tokens in GRID:
            generator = torch.Generator().manual_seed(tokens)
            shape = tokens // LENGTH, LENGTH
            ids = torch.randint(8, VOCABULARY, shape, generator=generator)
            if policy.ranks == "gather":
                half = shape[0] // RANKS
                ids = ids[half * where.rank : half * (where.rank + 1)]
            logits = model(ids).logits
            before, start = penstock.statistics(model), time.perf_counter()
            for _ in range(passes):
                logits = model(ids).logits
            seconds = (time.perf_counter() - start) / passes
            after = penstock.statistics(model)
            sent = after.ranks.bytes_sent - before.ranks.bytes_sent
            found[tokens] = {
                "seconds": seconds,
                "sent": sent // passes,
                "gathers": (after.ranks.num_gathers - before.ranks.num_gathers)
                // passes,
                "logits": logits.double().sum(-1).flatten().tolist(),
            }
    return found


def turn(few: Mapping[int, float], many: Mapping[int, float]) -> float | None:
    """The tokens a pass at which `many` gets as fast as `few`, between points of the
    grid on a line in log-log scale; None if it does not."""
    before: tuple[int, float] | None = None
    for tokens in sorted(few):
        ratio = math.log(few[tokens] / many[tokens])
        if ratio > 0:
            if before is None:
                return None
            share = -before[1] / (ratio - before[1])
            return float(before[0] * (tokens / before[0]) ** share)
        before = tokens, ratio
    return None


def machine_of(found: Machine | None, network: int, folder: Path) -> Machine:
    """The machine as each rank has it: as if each were on one of its own, with one core
    and a network of this speed."""
    if found is None:
        found = make_plan(folder, Policy(), None, Workload()).machine
    half = part_of(found, RANKS, reads_once=True)
    return half.model_copy(
        update={"network_bandwidth": network, "host_memory": found.host_memory}
    )


def predicted(folder: Path, machine: Machine, rate: str) -> dict[str, float | None]:
    """The switch that the planner predicts, and those of formulas."""
    policy = policy_of("tensor", rate).with_settings(["ranks=null"])
    work = Workload(Score(), LENGTH)
    whole = make_plan(folder, policy, machine, work).planner
    group = RankGroup(RANKS, RANKS)
    tensor = tensor_planner(folder, whole, group)
    gather = gathering_planner(whole, group)
    (ways,) = two_ways(
        (tensor, tensor.policy, tensor.forecast_for(tensor.policy)),
        (gather, gather.policy, gather.forecast_for(gather.policy)),
    )
    itemsize = torch.float32.itemsize
    weights = tensor.cut.block_bytes / BLOCKS
    return {
        "planner": ways.switch.most,
        "outputs_formula": tensor.crossover_tokens,
        "paper_formula": gather_crossover_tokens(weights, HIDDEN, itemsize),
    }


def main() -> int:
    parser = frame.parser(__doc__)
    parser.add_argument("--network", default="10MB")
    parser.add_argument("--rate", default="50MB")
    parser.add_argument("--passes", type=int, default=2)
    parser.add_argument("--machine")
    options = parser.parse_args()
    folder = make(OUT / "switch")
    link = Policy(links={"host": {"bandwidth": options.network}}).links["host"]
    network = link.bandwidth
    found = {
        way: run_ranks(
            RANKS,
            rank,
            folder,
            policy_of(way, options.rate),
            network,
            options.passes,
        )
        for way in WAYS
    }
    print("| tokens a pass | tensor | sent | outputs | gather | sent | faster |")
    print("|---|---|---|---|---|---|---|")
    seconds: dict[str, dict[int, float]] = {way: {} for way in WAYS}
    is_same = True
    for tokens in GRID:
        words = []
        for way in WAYS:
            each = [one[tokens] for one in found[way]]
            seconds[way][tokens] = max(one["seconds"] for one in each)
            words += [
                f"{seconds[way][tokens]:.2f} s",
                f"{each[0]['sent'] / 1e6:.2f} MB",
            ]
            words += [f"{each[0]['gathers']}"] * (way == "tensor")
        whole = found["tensor"][0][tokens]["logits"]
        is_same &= whole == [x for one in each for x in one["logits"]]
        faster = WAYS[seconds["tensor"][tokens] > seconds["gather"][tokens]]
        print(f"| {tokens} | {' | '.join(words)} | {faster} |", flush=True)
    measured = turn(seconds["tensor"], seconds["gather"])
    machine = machine_of(find_machine(options.machine), network, folder)
    expected = predicted(folder, machine, options.rate)
    steps = {
        name: abs(math.log2(measured / value)) if measured and value else None
        for name, value in expected.items()
    }
    says = ", ".join(f"{name} {value or 0:.0f}" for name, value in expected.items())
    print(f"switch at {measured or 0:.0f} tokens a pass; {says}")
    result = {
        "measured": measured,
        **expected,
        "doublings": steps,
        "seconds": seconds,
        "same": is_same,
    }
    is_near = all(step is not None and step <= 1.0 for step in steps.values())
    return frame.finish(result, is_good=is_near and is_same)


if __name__ == "__main__":
    sys.exit(main())

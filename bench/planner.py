"""Compares the planner's choice with random valid policies.

    python bench/planner.py [--policies 60] [--seed 0] [--machine FILE] [--out DIR]

A small Llama with random weights is scored on one machine, under one memory budget that
the model does not fit into. The planner's choice is measured again after every few of
the others, so that each has it just before and just after: `adjusted` divides by the
mean of these two, `raw` by the median of all. The best of many noisy figures is too
good. So the few best (adjusted) are measured again, in turns with the planner's choice:
`confirmed` is from these laps only. Each figure is the rate of the planner's choice
divided by that of the best other policy; the goal is 0.97. The last line is one JSON
object.

Takes about ten minutes; needs 0.4 GB of a real drive and 2 GB of memory.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # as the command line does

from rich.console import Console

from common import frame
from common.prediction_cases import SHAPES, make_model
from penstock.io.errors import PenstockError
from penstock.offload.machines.machine import Machine
from penstock.offload.machines.measuring import measure_machine
from penstock.offload.plans.plan import Plan, make_plan
from penstock.offload.plans.planned import Choice, Workload
from penstock.offload.policy import IO, Policy
from penstock.offload.settings.values import parse_bytes
from penstock.offload.tasks.score_task import Score
from penstock.offload.tuning.slices import Slice, made_up, measured_rate, predicted_rate
from penstock.scheduler.cost.memory_need import RUNTIME_BYTES

GOAL = 0.97
SHAPE = 2
"""The index in `prediction.SHAPES`: six blocks, 0.65 GB in float32."""
USABLE = 0.9  # the share of the memory that the planner may use
MOST_DRAWN = 10_000
STEP_BYTES = 64 << 20

Rate = Callable[[Policy], float]


@dataclass(frozen=True)
class Other:
    """A random policy, and its rate next to that of the planner's choice."""

    settings: dict[str, Any]
    predicted: float
    rate: float | None
    """Tokens per second; None if it could not run."""
    before: float
    """Tokens per second of the planner's choice, just before."""
    after: float
    error: str = ""

    @property
    def adjusted(self) -> float:
        """The rate divided by that of the planner's choice at that time."""
        return 0.0 if self.rate is None else 2 * self.rate / (self.before + self.after)


def limited(machine: Machine, budget_bytes: int) -> Machine:
    """The machine with memory for this many bytes of weights and what is in flight."""
    host_memory = round((budget_bytes + RUNTIME_BYTES) / USABLE)
    return Machine(**{**machine.model_dump(), "host_memory": host_memory})


def drawn(
    chosen: random.Random, machine: Machine, most: int, budget_bytes: int
) -> dict[str, Any]:
    """The settings of one random policy, with at most `most` tokens in flight."""
    each = chosen.choice((64, 128, 256, 512, 1024))
    widths = [width for width in (1, 2, 4, 8, 16) if each * width <= most] or [1]
    disk = machine.disk
    assert disk is not None, "it was measured"
    return {
        "micro_batch_tokens": each,
        "tokens_in_flight": each * chosen.choice(widths),
        "device_memory": chosen.randint(1, budget_bytes // STEP_BYTES) * STEP_BYTES,
        "lookahead": chosen.choice((1, 2, 3, 4)),
        "io": {
            "reader": chosen.choice(sorted(disk.bandwidth)),
            "threads": chosen.choice((1, 2, 4)),
            "depth": chosen.choice((2, 4, 8)),
        },
    }


def others(plan: Plan, num: int, seed: int, most_tokens: int) -> list[Choice]:
    """`num` different random policies that fit the machine, as the planner's choice
    does; always the same ones for a seed."""
    chosen = random.Random(seed)
    found: dict[str, Choice] = {}
    asked = plan.planner.policy.model_dump(exclude_unset=True)
    budget = plan.planner.budget.device
    for _ in range(MOST_DRAWN):
        settings = drawn(chosen, plan.machine, most_tokens, budget)
        choice = plan.planner.beside(plan.choice, Policy(**{**asked, **settings}))
        if choice is not None:
            found.setdefault(json.dumps(_dumped(choice.policy), sort_keys=True), choice)
        if len(found) == num:
            return list(found.values())
    raise SystemExit(
        f"only {len(found)} of {num} policies fit this budget: give a larger --budget"
    )


def _dumped(policy: Policy) -> dict[str, Any]:
    return policy.model_dump(mode="json", exclude_unset=True)


def sweep(
    planned: Policy,
    choices: Sequence[Choice],
    work: Slice,
    rate: Rate,
    every: int,
    show: Callable[[str], None],
) -> tuple[list[Other], list[float]]:
    """Measures all policies, and the planner's choice after every few of them."""
    found: list[Other] = []
    own = [rate(planned)]
    show(f"planner's choice {own[0]:8,.1f} tokens/s")
    for start in range(0, len(choices), every):
        group = choices[start : start + every]
        rates: list[float | str] = []
        for choice in group:
            try:
                rates.append(rate(choice.policy))
            except PenstockError as error:
                rates.append(str(error))
            show(f"{start + len(rates):3} {_shown(rates[-1])}  {_named(choice.policy)}")
        own.append(rate(planned))
        show(f"planner's choice {own[-1]:8,.1f} tokens/s")
        for choice, result in zip(group, rates, strict=True):
            found.append(
                Other(
                    _dumped(choice.policy),
                    predicted_rate(choice, work) or 0.0,
                    result if isinstance(result, float) else None,
                    own[-2],
                    own[-1],
                    "" if isinstance(result, float) else result,
                )
            )
    return found, own


def confirm(
    planned: Policy, best: Sequence[Other], rate: Rate, laps: int
) -> list[float]:
    """The rate of each of `best` divided by that of the planner's choice.

    It is the median of several laps, in which all run in turns; every second lap runs
    backwards.
    """
    ratios: list[list[float]] = [[] for _ in best]
    for lap in range(laps):
        first = rate(planned)
        order = list(enumerate(best))
        rates = {
            number: rate(Policy(**other.settings))
            for number, other in (order if lap % 2 == 0 else order[::-1])
        }
        own = (first + rate(planned)) / 2
        for number, found in rates.items():
            ratios[number].append(found / own)
    return [statistics.median(of_one) for of_one in ratios]


def summary(
    found: Sequence[Other], own: Sequence[float], confirmed: Sequence[float]
) -> dict[str, Any]:
    """The rate of the planner's choice divided by that of the best other one, in three
    ways."""
    ran = [other for other in found if other.rate is not None]
    best = max(other.rate or 0.0 for other in ran)
    adjusted = max(other.adjusted for other in ran)
    result: dict[str, Any] = {
        "policies": len(found),
        "failed": len(found) - len(ran),
        "planner_tokens_per_second": statistics.median(own),
        "planner_spread": (max(own) - min(own)) / statistics.median(own),
        "best_tokens_per_second": best,
        "planner_over_best_raw": statistics.median(own) / best,
        "planner_over_best_adjusted": 1 / adjusted,
    }
    if confirmed:
        result["planner_over_best_confirmed"] = 1 / max(confirmed)
    result["goal"] = GOAL
    return result


def _shown(rate: float | str) -> str:
    return f"{rate:8,.1f} tokens/s" if isinstance(rate, float) else f"out: {rate}"


def _named(policy: Policy) -> str:
    memory = policy.device_memory
    size = f"{memory >> 20} MiB" if isinstance(memory, int) else memory
    io = policy.io
    return (
        f"{policy.micro_batch_tokens} of {policy.tokens_in_flight} tokens, {size}, "
        f"lookahead {policy.lookahead}, {io.reader} {io.threads}/{io.depth}"
    )


def parse_args(arguments: list[str] | None) -> argparse.Namespace:
    parser = frame.parser(__doc__)
    parser.add_argument("--policies", type=int, default=60)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--machine", type=Path, help="its file, else it is measured")
    parser.add_argument("--budget", default="512MiB", help="bytes of memory for all")
    parser.add_argument("--disk", help="hold the drive to it, such as 300MB a second")
    parser.add_argument("--tokens", type=int, default=2048, help="of a run, at least")
    parser.add_argument("--length", type=int, default=128, help="tokens of a row")
    parser.add_argument("--every", type=int, default=5, help="others between planner's")
    parser.add_argument("--top", type=int, default=5, help="best ones to confirm")
    parser.add_argument("--laps", type=int, default=3, help="of confirming")
    parser.add_argument("--models", type=Path, help="folder to keep the model in")
    parser.add_argument("--out", type=Path, help="folder for planner.json")
    parser.add_argument("--shrink", type=int, default=1, help="make the model smaller")
    return parser.parse_args(arguments)


def planned(folder: Path, args: argparse.Namespace, machine: Machine) -> Plan:
    """The planner's choice under the memory budget."""
    asked: dict[str, Any] = {"dtype": "float32"}
    if args.disk:
        asked["links"] = {"disk": {"bandwidth": args.disk}}
    small = limited(machine, parse_bytes(args.budget))
    return make_plan(folder, Policy(**asked), small, Workload(Score(), args.length))


def run(folder: Path, args: argparse.Namespace, machine: Machine) -> dict[str, Any]:
    """Runs the comparison; the model exists and the machine is measured."""

    def show(text: str) -> None:
        print(text, flush=True)

    plan = planned(folder, args, machine)
    tokens = max(args.tokens, plan.policy.tokens_in_flight)
    work = made_up(plan.task, args.length).cut(plan.task, tokens, 1)
    choices = others(plan, args.policies, args.seed, tokens)

    def rate(policy: Policy) -> float:
        return measured_rate(folder, policy, work)

    show(f"planner: {_named(plan.policy)}; {plan.choice.prediction.binds} binds")
    show(f"predicted {predicted_rate(plan.choice, work) or 0.0:,.1f} tokens/s")
    rate(plan.policy)  # warms up
    found, own = sweep(plan.policy, choices, work, rate, args.every, show)
    ran = [other for other in found if other.rate is not None]
    best = sorted(ran, key=lambda other: -other.adjusted)[: args.top]
    confirmed = confirm(plan.policy, best, rate, args.laps) if args.laps else []
    for other, ratio in zip(best, confirmed, strict=False):
        show(f"again: {ratio:.3f} of the planner's  {_named(Policy(**other.settings))}")
    made = summary(found, own, confirmed)
    made["planner_policy"] = _dumped(plan.policy)
    made["others"] = [{**vars(other), "adjusted": other.adjusted} for other in found]
    return made


def main(arguments: list[str] | None = None) -> int:
    args = parse_args(arguments)
    console = Console(stderr=True)
    with frame.scratch(kept=args.models) as kept:
        folder = make_model(kept / f"{SHAPE}", SHAPES[SHAPE], shrink=args.shrink)
        if args.machine:
            machine = Machine.from_yaml(args.machine)
        else:
            machine = measure_machine(kept, IO(), console.print)
        found = run(folder, args, machine)
    ways = ("raw", "adjusted", "confirmed")
    values = {way: found.get(f"planner_over_best_{way}") for way in ways}
    print(
        "planner/best: "
        + ", ".join(f"{way} {value:.3f}" for way, value in values.items() if value)
        + f" (goal {GOAL}); the planner's own runs differ by "
        f"{found['planner_spread']:.1%}"
    )
    return frame.finish(found, out=args.out and args.out / "planner.json")


if __name__ == "__main__":
    sys.exit(main())

"""Compares predictions with measurements: random policies, models and shapes.

    python bench/prediction.py [--runs 30] [--laps 3] [--seed 0] [--to int4]

Each lap measures this machine first (or takes --machine FILE), then runs all cases and
prints predicted and measured times. The error of a case is the median of its
predictions, from the machine files of all laps, divided by the median of its runs.
Before and after each run, the rates of matrix products and of the drive are measured
for a moment: `drift` is that rate divided by the one in the file. The error is also
given with the rates of the file times their drift. So errors of the model can be told
from changes of the machine. Cases are small Llamas with random weights (in bfloat16, or
converted `--to` fewer bits), scored and completed, streamed from disk, with a part of
them in host memory, and over links with limited speed. The last line is one JSON
object.

Takes about six minutes a lap, and one to measure the machine; needs 2 GB of a real
drive and 4 GB of memory.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # as the command line does

from rich.console import Console

import penstock
from common import frame
from common.drift import Probe, drifted
from common.models import converted
from common.prediction_cases import SHAPES, Case, cases, make_model
from penstock import Policy
from penstock.offload.machines.machine import Machine
from penstock.offload.machines.measure_calls import CountingTokenizer
from penstock.offload.machines.measuring import measure_machine
from penstock.offload.plans.forecast import forecast, generating_of, scoring_of
from penstock.offload.policy import IO
from penstock.offload.tasks.generate import generate
from penstock.offload.tasks.generate_task import Generate
from penstock.offload.tasks.score import score
from penstock.offload.tasks.score_task import Score
from penstock.offload.weights.blueprint import blueprint
from penstock.scheduler.cost.workload import Generating, Prediction, Scoring, predict


@dataclass(frozen=True)
class Result:
    """The predicted and the measured seconds of a case."""

    case: Case
    predicted: float
    measured: float
    adjusted: float
    """The prediction for the machine with its rates at that time."""
    compute_drift: float
    disk_drift: float
    binds: str

    @property
    def error(self) -> float:
        return abs(self.predicted / self.measured - 1.0)

    @property
    def adjusted_error(self) -> float:
        return abs(self.adjusted / self.measured - 1.0)


def predicted(folder: Path, case: Case, machine: Machine) -> Prediction:
    policy = Policy(**case.settings)
    skeleton, _ = blueprint(folder, policy.dtype)
    task = Generate(case.new_tokens) if case.generates else Score()
    made = forecast(skeleton.model, skeleton.recipes, policy, machine, task)
    work: Scoring | Generating = scoring_of(policy, [case.length] * case.num_rows)
    if case.generates:
        work = generating_of(
            policy,
            case.num_rows,
            case.length,
            case.new_tokens,
            in_parts=made.shape.prompts_in_parts,
        )
    return predict(made.model, work)


def measured(folder: Path, case: Case) -> float:
    """Measured seconds of the job, without loading the model."""
    with penstock.load(folder, Policy(**case.settings)) as model:
        tokenizer = CountingTokenizer(min(500, model.config.vocab_size))
        model.generation_config.eos_token_id = None
        rows = [
            {"id": number, "text": str(case.length)} for number in range(case.num_rows)
        ]
        start = time.perf_counter()
        if case.generates:
            results = generate(
                model,
                rows,
                max_new_tokens=case.new_tokens,
                tokenizer=tokenizer,
                do_sample=False,
            )
        else:
            results = score(model, rows, tokenizer=tokenizer)
        failed = [result for result in results if "error" in result]
        seconds = time.perf_counter() - start
    assert not failed, failed[0]
    return seconds


def run(folder: Path, case: Case, machine: Machine, probe: Probe) -> Result:
    plain = predicted(folder, case, machine)
    before = probe()
    seconds = measured(folder, case)
    after = probe()
    compute, disk = ((a + b) / 2 for a, b in zip(before, after, strict=True))
    now = predicted(folder, case, drifted(machine, compute, disk))
    return Result(case, plain.seconds, seconds, now.seconds, compute, disk, plain.binds)


def median_of(laps: list[Result]) -> Result:
    """The medians of one case, which has a result from each lap."""
    names = ("predicted", "measured", "adjusted", "compute_drift", "disk_drift")
    found = {
        name: statistics.median(getattr(result, name) for result in laps)
        for name in names
    }
    return replace(laps[0], binds=statistics.mode(r.binds for r in laps), **found)


def markdown(results: list[Result]) -> str:
    """A table of all runs."""
    lines = [
        "| model | task | settings | predicted s | measured s | error | adjusted "
        "| binds |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for result in results:
        case = result.case
        task = "generate" if case.generates else "score"
        task += f" {case.num_rows}x{case.length}+{case.new_tokens}"
        settings = ", ".join(f"{k}={v}" for k, v in case.settings.items())
        lines.append(
            f"| {SHAPES[case.shape]} | {task} | {settings} | {result.predicted:.2f} | "
            f"{result.measured:.2f} | {result.error:.1%} | "
            f"{result.adjusted_error:.1%} | {result.binds} |"
        )
    return "\n".join(lines) + "\n"


def summary(results: list[Result], laps: list[list[Result]]) -> dict[str, Any]:
    errors = [result.error for result in results]
    adjusted = [result.adjusted_error for result in results]
    return {
        "runs": len(results),
        "laps": [
            {
                "median_error": statistics.median(r.error for r in lap),
                "worst_error": max(r.error for r in lap),
                "predicted": [r.predicted for r in lap],
                "measured": [r.measured for r in lap],
            }
            for lap in laps
        ],
        "median_error": statistics.median(errors),
        "worst_error": max(errors),
        "median_adjusted_error": statistics.median(adjusted),
        "worst_adjusted_error": max(adjusted),
        "results": [
            {**asdict(r), "error": r.error, "adjusted_error": r.adjusted_error}
            for r in results
        ],
    }


def machine_of(
    args: argparse.Namespace, folder: Path, lap: int, console: Console
) -> Machine:
    """The machine of its file, or as it is measured now and saved."""
    if args.machine:
        return Machine.from_yaml(args.machine)
    machine = measure_machine(folder, IO(), console.print)
    if args.out:
        frame.write(args.out / f"machine-{lap}.yaml", machine.to_yaml())
    return machine


def lap(made: list[Case], folder: Path, machine: Machine, probe: Probe) -> list[Result]:
    """Runs each case once, and prints each result."""
    results = []
    for case in frame.progress(made, "cases"):
        result = run(folder / str(case.shape), case, machine, probe)
        results.append(result)
        print(
            f"{len(results):3} {'generate' if case.generates else 'score   '} "
            f"predicted {result.predicted:6.2f} s, measured {result.measured:6.2f}: "
            f"{result.error:5.1%}, adjusted {result.adjusted_error:5.1%} (products "
            f"{result.compute_drift:.2f}, drive {result.disk_drift:.2f}), "
            f"{result.binds} binds",
            flush=True,
        )
    return results


def parse_args(arguments: list[str] | None) -> argparse.Namespace:
    parser = frame.parser(__doc__)
    parser.add_argument("--runs", type=int, default=30)
    parser.add_argument("--laps", type=int, default=1, help="over all cases: medians")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--machine", type=Path, help="its file, else it is measured")
    parser.add_argument("--models", type=Path, help="folder to keep the models in")
    parser.add_argument("--out", type=Path, help="folder for prediction.md and .json")
    parser.add_argument(
        "--to", choices=("fp8", "int8", "int4", "lossless"), help="convert the models"
    )
    parser.add_argument("--shrink", type=int, default=1, help="make models smaller")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    args = parse_args(arguments)
    console = Console(stderr=True)
    with frame.scratch(kept=args.models) as folder:
        made = cases(args.runs, args.seed)
        for number in sorted({case.shape for case in made}):
            name, shape = str(number), SHAPES[number]
            if args.to is None:
                make_model(folder / name, shape, shrink=args.shrink)
            elif not (folder / name).exists():
                whole = make_model(folder / f"{name}-bf16", shape, shrink=args.shrink)
                converted(whole, folder / name, args.to)
        largest = max(folder.glob("*/*.safetensors"), key=lambda p: p.stat().st_size)
        laps = []
        for number in range(1, args.laps + 1):
            machine = machine_of(args, folder, number, console)
            probe = Probe(machine, largest)
            measured(folder / str(made[0].shape), made[0])  # warms up
            laps.append(lap(made, folder, machine, probe))
    results = [median_of(list(of_case)) for of_case in zip(*laps, strict=True)]
    found = summary(results, laps)
    print(
        f"median error {found['median_error']:.1%}, worst {found['worst_error']:.1%}; "
        f"adjusted: {found['median_adjusted_error']:.1%}, "
        f"{found['worst_adjusted_error']:.1%}"
    )
    if args.out:
        frame.write(args.out / "prediction.md", markdown(results))
    return frame.finish(found, out=args.out and args.out / "prediction.json")


if __name__ == "__main__":
    sys.exit(main())

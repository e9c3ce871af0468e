"""How far predictions are from what is measured: random policies, models and shapes.

    python bench/prediction.py [--runs 30] [--seed 0] [--out DIR]

Measures this machine first (or takes --machine FILE), then runs each case and prints
predicted over measured. Beside each run the products' and the drive's rates are taken
again for a moment, before and after: `drift` is what the machine did then over what its
file says. The error is given as it is, and again with compute and disk of the machine's
file times their drift, which tells what the model gets wrong from what the machine did
meanwhile. Cases are small Llamas with random weights, scored and completed, streamed
from disk, with part of them in host memory, and over links held to a lower speed. The
last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # as the command line does

import torch
from rich.console import Console
from rich.progress import track
from transformers import LlamaConfig, LlamaForCausalLM

import penstock
from penstock import Policy
from penstock.offload.machines import measure
from penstock.offload.machines.machine import Machine
from penstock.offload.machines.measure_calls import CountingTokenizer
from penstock.offload.machines.measuring import measure_machine
from penstock.offload.plans.forecast import forecast, generating_of, scoring_of
from penstock.offload.policy import IO, parse_bytes
from penstock.offload.tasks.generate import generate
from penstock.offload.tasks.score import score
from penstock.offload.weights.blueprint import blueprint
from penstock.scheduler.workload import Generating, Prediction, Scoring, predict

SHAPES = (  # hidden, intermediate, layers, kv heads, vocabulary
    (768, 2048, 12, 12, 8000),
    (1024, 2816, 10, 4, 16000),
    (1536, 4096, 6, 24, 8000),
    (2048, 5632, 4, 8, 32000),
)
PROBE_ROWS = 512
FLOPS_OF_A_RUN = 6e11
"""About: three to ten seconds on a few cores."""


@dataclass(frozen=True)
class Case:
    """One run: a model, what is done with it, and how."""

    shape: int
    generates: bool
    num_rows: int
    length: int
    new_tokens: int
    settings: dict[str, Any]


@dataclass(frozen=True)
class Result:
    """Seconds as predicted and as measured."""

    case: Case
    predicted: float
    measured: float
    adjusted: float
    """Predicted for the machine as it was just then."""
    compute_drift: float
    disk_drift: float
    binds: str

    @property
    def error(self) -> float:
        return abs(self.predicted / self.measured - 1.0)

    @property
    def adjusted_error(self) -> float:
        return abs(self.adjusted / self.measured - 1.0)


def cases(num: int, seed: int) -> list[Case]:
    """Some, always the same for a seed; a third of them generates."""
    chosen = random.Random(seed)
    return [_case(chosen, number % 3 == 2) for number in range(num)]


def _case(chosen: random.Random, generates: bool) -> Case:
    shape = chosen.randrange(len(SHAPES))
    settings: dict[str, Any] = {
        "dtype": "float32",
        "device_memory": chosen.choice(_fitting(SHAPES[shape])),
        "lookahead": chosen.choice((1, 2, 3)),
        "gather_rows": chosen.choice(("1MiB", "1GiB")),
    }
    way = chosen.choice(("disk", "disk", "host", "slow disk", "slow host"))
    if "host" in way:
        settings["host_memory"] = chosen.choice(("64MiB", "128MiB", "256MiB"))
    if way.startswith("slow"):
        speed = chosen.choice(("100MB", "200MB", "400MB"))
        settings["links"] = {way.removeprefix("slow "): {"bandwidth": speed}}
    most_tokens = FLOPS_OF_A_RUN / flops_of_token(SHAPES[shape])
    if not generates:
        length = chosen.choice((32, 64, 128, 256))
        each = max(length, chosen.choice((64, 128, 256, 512)))
        settings["micro_batch_tokens"] = each
        settings["tokens_in_flight"] = each * chosen.choice((1, 2, 4))
        passes = round(most_tokens / settings["tokens_in_flight"])
        passes = min(max(passes, 2), 12)
        num_rows = settings["tokens_in_flight"] // length * passes
        return Case(shape, False, num_rows, length, 0, settings)
    settings["micro_batch_sequences"] = chosen.choice((4, 8, 16))
    settings["sequences_in_flight"] = 16 * chosen.choice((1, 2, 4))
    if chosen.random() < 0.5:
        settings["kv"] = {"tier": "host"}
    num_rows, length = settings["sequences_in_flight"], chosen.choice((16, 32, 64))
    # Products of few rows have about a third of the rate of those of many.
    new = round((most_tokens / num_rows - length) / 3)
    return Case(shape, True, num_rows, length, min(max(new, 6), 24), settings)


def _fitting(shape: tuple[int, ...]) -> list[str]:
    """Working sets that the largest part goes into: the head, in float32."""
    hidden, *_, vocabulary = shape
    least = 4 * hidden * vocabulary + (1 << 20)
    sizes = ("192MiB", "256MiB", "512MiB")
    return [size for size in sizes if parse_bytes(size) >= least]


def flops_of_token(shape: tuple[int, ...]) -> float:
    """About; what the blocks' products take."""
    hidden, intermediate, layers, *_ = shape
    return 2.0 * layers * hidden * (3 * hidden + 3 * intermediate)


def make_model(folder: Path, shape: tuple[int, ...], *, shrink: int) -> Path:
    """A Llama with random weights in bfloat16; not as wide by `shrink`."""
    hidden, intermediate, layers, kv_heads, vocabulary = shape
    if folder.exists():
        return folder
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=hidden // shrink,
        intermediate_size=intermediate // shrink,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 64,
        num_key_value_heads=kv_heads,
        vocab_size=vocabulary // shrink,
        eos_token_id=None,
        bos_token_id=None,
    )
    model = LlamaForCausalLM(config).to(torch.bfloat16)  # type: ignore[arg-type]
    model.save_pretrained(folder)
    return folder


def predicted(folder: Path, case: Case, machine: Machine) -> Prediction:
    policy = Policy(**case.settings)
    skeleton, _ = blueprint(folder, policy.dtype)
    made = forecast(
        skeleton.model, skeleton.recipes, policy, machine, generates=case.generates
    )
    work: Scoring | Generating = scoring_of(policy, [case.length] * case.num_rows)
    if case.generates:
        work = generating_of(policy, case.num_rows, case.length, case.new_tokens)
    return predict(made.model, work)


def measured(folder: Path, case: Case) -> float:
    """Seconds of the job, once the model is loaded."""
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


class Probe:
    """Products and the drive for a moment, over what the machine's file says."""

    def __init__(self, machine: Machine, file: Path) -> None:
        self._machine = machine
        self._file = file
        self._weights = [torch.randn(5632, 2048) for _ in range(3)]
        self._x = torch.randn(PROBE_ROWS, 2048)

    def __call__(self) -> tuple[float, float]:
        """(products, drive)."""
        seconds = []
        for weight in self._weights * 4:
            start = time.perf_counter()
            torch.nn.functional.linear(self._x, weight)
            seconds.append(time.perf_counter() - start)
        flops = 2 * PROBE_ROWS * 2048 * 5632 / statistics.median(seconds)
        found = measure.disk(self._file, IO(), lambda text: None)
        disk = self._machine.disk
        assert disk is not None, "it was measured"
        reader = disk.best_reader
        return (
            flops / self._machine.matmul["float32"][PROBE_ROWS],
            found.bandwidth[reader] / disk.bandwidth[reader],
        )


def drifted(machine: Machine, compute: float, disk: float) -> Machine:
    """The machine as it was just then: all that computes `compute` times as fast."""
    assert machine.disk is not None, "it was measured"

    def faster(rates: dict[Any, dict[Any, float]]) -> dict[Any, dict[Any, float]]:
        return {d: {n: r * compute for n, r in by.items()} for d, by in rates.items()}

    def scaled(value: int | None) -> int | None:
        return None if value is None else round(value * compute)

    calls = {key: value / compute for key, value in machine.calls.model_dump().items()}
    rates = {name: round(rate * disk) for name, rate in machine.disk.bandwidth.items()}
    values = machine.model_dump()
    values |= {
        "matmul": faster(values["matmul"]),
        "attention": faster(values["attention"]),
        "pointwise_bandwidth": scaled(machine.pointwise_bandwidth),
        "decode_bandwidth": scaled(machine.decode_bandwidth),
        "cast_bandwidth": scaled(machine.cast_bandwidth),
        "host_bandwidth": scaled(machine.host_bandwidth),
        "calls": calls,
        "disk": {**values["disk"], "bandwidth": rates},
    }
    return Machine(**values)


def run(folder: Path, case: Case, machine: Machine, probe: Probe) -> Result:
    plain = predicted(folder, case, machine)
    before = probe()
    seconds = measured(folder, case)
    after = probe()
    compute, disk = ((a + b) / 2 for a, b in zip(before, after, strict=True))
    now = predicted(folder, case, drifted(machine, compute, disk))
    return Result(case, plain.seconds, seconds, now.seconds, compute, disk, plain.binds)


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


def summary(results: list[Result]) -> dict[str, Any]:
    errors = [result.error for result in results]
    adjusted = [result.adjusted_error for result in results]
    return {
        "runs": len(results),
        "median_error": statistics.median(errors),
        "worst_error": max(errors),
        "median_adjusted_error": statistics.median(adjusted),
        "worst_adjusted_error": max(adjusted),
        "results": [
            {**asdict(r), "error": r.error, "adjusted_error": r.adjusted_error}
            for r in results
        ],
    }


def parse_args(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--runs", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--machine", type=Path, help="its file, else it is measured")
    parser.add_argument("--models", type=Path, help="folder to keep the models in")
    parser.add_argument("--out", type=Path, help="folder for prediction.md and .json")
    parser.add_argument("--shrink", type=int, default=1, help="make models smaller")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    args = parse_args(arguments)
    console = Console(stderr=True)
    with tempfile.TemporaryDirectory(prefix="penstock-prediction-") as temporary:
        folder = args.models or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        made = cases(args.runs, args.seed)
        for number in sorted({case.shape for case in made}):
            make_model(folder / str(number), SHAPES[number], shrink=args.shrink)
        largest = max(folder.glob("*/*.safetensors"), key=lambda p: p.stat().st_size)
        if args.machine:
            machine = Machine.from_yaml(args.machine)
        else:
            machine = measure_machine(folder, IO(), console.print)
        if args.out:
            args.out.mkdir(parents=True, exist_ok=True)
            (args.out / "machine.yaml").write_text(machine.to_yaml())
        probe = Probe(machine, largest)
        measured(folder / str(made[0].shape), made[0])  # warms up
        results = []
        for case in track(made, console=console, disable=not console.is_terminal):
            result = run(folder / str(case.shape), case, machine, probe)
            results.append(result)
            print(
                f"{len(results):3} {'generate' if case.generates else 'score   '} "
                f"predicted {result.predicted:6.2f} s, measured "
                f"{result.measured:6.2f}: {result.error:5.1%}, adjusted "
                f"{result.adjusted_error:5.1%} (products "
                f"{result.compute_drift:.2f}, drive {result.disk_drift:.2f}), "
                f"{result.binds} binds",
                flush=True,
            )
    found = summary(results)
    print(
        f"median error {found['median_error']:.1%}, worst {found['worst_error']:.1%}; "
        f"adjusted: {found['median_adjusted_error']:.1%}, "
        f"{found['worst_adjusted_error']:.1%}"
    )
    if args.out:
        (args.out / "prediction.md").write_text(markdown(results))
        (args.out / "prediction.json").write_text(json.dumps(found, indent=1))
    print(json.dumps(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())

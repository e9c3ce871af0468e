"""Scores real texts with a 1.1B-parameter model in a 512 MiB working set.

Makes a checkpoint once (random weights of the Llama architecture, 2.2 GB; a tokenizer
trained on text found on this machine), plans for this machine, streams as many of 72
texts as take about a minute, and says how fast that was, beside what was predicted:
`python examples/demo.py`. A second run reuses the checkpoint.
"""

import argparse
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

import penstock
from checkpoint import make_checkpoint

HERE = Path(__file__).parent
TEXTS = HERE / "texts.jsonl"
COMMAND = Path(sys.executable).with_name("penstock")
"""The command line that is installed beside this Python."""
SECONDS = 60.0
LETTERS_PER_TOKEN = 2.0  # of a tokenizer that was trained on little
LEAST_ROWS = 4


def rows_for(seconds: float, rate: float, lengths: Sequence[float]) -> int:
    """How many of the first rows, which have `lengths` tokens, take at most `seconds`
    at `rate` tokens a second; a few in any case."""
    left = seconds * rate
    for number, length in enumerate(lengths):
        left -= length
        if left < 0:
            return min(max(LEAST_ROWS, number), len(lengths))
    return len(lengths)


def lengths_of(lines: Sequence[str]) -> list[float]:
    """Tokens of each row, about."""
    keys = ("text", "prompt", "completion")
    rows = [json.loads(line) for line in lines]
    return [
        sum(len(row.get(key, "")) for key in keys) / LETTERS_PER_TOKEN for row in rows
    ]


def planned(folder: Path, settings: Sequence[str]) -> dict[str, Any]:
    """What `penstock plan` predicts on this machine."""
    command: list[str | Path] = [
        COMMAND,
        "plan",
        folder,
        "--json",
        "--prompt",
        "64",
        *settings,
    ]
    made = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    found: dict[str, Any] = json.loads(made.stdout)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", default="1.1b", help="1.1b, 3b or tiny")
    parser.add_argument("--device-memory", default="512MiB")
    parser.add_argument("--out", type=Path, default=HERE / "out")
    args = parser.parse_args()

    console = Console(stderr=True)
    model = args.out / f"llama-{args.size}"
    folder = make_checkpoint(model, args.size, console=console)
    settings = ["--set", f"device_memory={args.device_memory}"]
    plan = planned(folder, settings)
    rate, lines = plan["tokens_per_second"], TEXTS.read_text().splitlines()
    num = rows_for(SECONDS, rate, lengths_of(lines))
    how = "by a quick estimate" if plan["is_estimate"] else "by its machine file"
    console.print(
        f"penstock {penstock.__version__}: this machine does about {rate:,.0f} "
        f"tokens/s in {plan['dtype']}, {how}: scoring {num} of {len(lines)} texts",
        highlight=False,
        soft_wrap=True,
    )
    rows, scores = args.out / "rows.jsonl", args.out / "scores.jsonl"
    rows.write_text("\n".join(lines[:num]) + "\n")
    command: list[str | Path] = [
        COMMAND,
        "score",
        folder,
        rows,
        "-o",
        scores,
        "--restart",
    ]
    done = subprocess.run([*command, *settings, "--report", args.out], check=False)
    if done.returncode == 0:
        report = json.loads((args.out / "report.json").read_text())
        predicted = report["plan"].get("predicted_tokens_per_second")
        says = "nothing" if predicted is None else f"{predicted:,.1f}"
        print(
            f"{report['rows']} texts, {report['tokens']:,} tokens in "
            f"{report['seconds']:.1f} s: {report['tokens_per_second']:,.1f} tokens/s "
            f"({says} predicted), bound by {report['bound_by']}, with "
            f"{report['peak_device_bytes'] / 2**20:,.0f} MiB of "
            f"{report['model_bytes'] / 2**20:,.0f} MiB of weights in memory"
        )
        print(f"scores: {scores}\nreport: {args.out / 'report.html'}")
    sys.exit(done.returncode)


if __name__ == "__main__":
    main()

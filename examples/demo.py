"""Scores 72 real texts with a 1.1B-parameter model in a 512 MiB working set.

Makes a checkpoint once (random weights of the Llama architecture, 2.2 GB; a tokenizer
trained on text found on this machine), streams it from disk, and says how that went:
`python examples/demo.py`. A second run reuses the checkpoint.
"""

import argparse
import sys
from pathlib import Path

from rich.console import Console

from checkpoint import make_checkpoint
from penstock import Policy
from penstock.offload.jobs.job import Job
from penstock.offload.jobs.work import ScoreWork
from penstock.offload.machines.computer import has_bfloat16
from penstock.offload.monitoring.show import report_table

HERE = Path(__file__).parent


def compute_dtype() -> str:
    """The checkpoint's bfloat16, unless this CPU has no instructions for it: then
    float32, cast on the way in, is about four times faster."""
    return "auto" if has_bfloat16() else "float32"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", default="1.1b", help="1.1b, 3b or tiny")
    parser.add_argument("--device-memory", default="512MiB")
    parser.add_argument("--out", type=Path, default=HERE / "out")
    args = parser.parse_args()

    console = Console(stderr=True)
    folder = make_checkpoint(
        args.out / f"llama-{args.size}", args.size, console=console
    )
    dtype = compute_dtype()
    if dtype != "auto":
        console.print(
            f"this CPU has no instructions for bfloat16: computing in {dtype}"
        )
    policy = Policy(device_memory=args.device_memory, dtype=dtype)
    job = Job(
        ScoreWork(),
        model=folder,
        source=HERE / "texts.jsonl",
        output=args.out / "scores.jsonl",
        policy=policy,
        report=args.out,
        mode="restart",
    )
    done = job.run(console)
    assert done.report is not None, "a job that begins anew does all its rows"
    Console().print(
        report_table(
            done.report, f"{folder.name} in a working set of {args.device_memory}"
        )
    )
    print(f"scores: {job.output}\nreport: {args.out / 'report.html'}")
    sys.exit(1 if done.num_errors else 0)


if __name__ == "__main__":
    main()

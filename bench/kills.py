"""Kills a job at random moments with kill -9 and resumes it: the output must equal that
of an undisturbed job, byte for byte.

    python bench/kills.py [--kills 200] [--rows 5000] [--task score] [--seed 0]
    python bench/kills.py --task generate    # 320 rows, in parts of 32

The job scores (or completes) rows with a model of 0.2M parameters, streamed from disk.
It runs in a fork of a process that has imported everything, so that a try takes the
time of the job and not of the imports. Each try is killed after a random time, at most
as long as the undisturbed job took; every second one only once it is writing. If a job
ends before, its output is compared, and another one begins. What is on disk at each
kill is counted. The last line is one JSON object; the exit code is 1 if anything
differed.

Takes about six minutes; needs Linux and a second of one core for each try.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

os.environ["TOKENIZERS_PARALLELISM"] = "false"  # its threads do not survive a fork

import torch
import transformers.models.llama.modeling_llama
from rich.console import Console

from common import frame, models
from penstock import Policy
from penstock.offload.jobs.job import Job
from penstock.offload.tasks.generate_task import Generate
from penstock.offload.tasks.score_task import Score
from penstock.offload.tasks.task import Task

assert transformers.models.llama.modeling_llama is not None, "imported for the forks"
NUM_ROWS = {"score": 5000, "generate": 320}
"""Rows of a job that takes one or two seconds and has several parts."""
WORDS = ("river", "stone", "wind", "paper", "light", "slow", "green", "under", "walk")


def write_rows(path: Path, num_rows: int, seed: int) -> None:
    """Writes short rows; one in a hundred is not a valid row."""
    drawn = random.Random(seed)
    with path.open("w") as file:
        for number in range(num_rows):
            text = " ".join(drawn.choices(WORDS, k=drawn.randint(1, 4)))
            row = {"id": number, "text" if number % 100 else "wrong": text}
            file.write(json.dumps(row) + "\n")


def run_job(name: str, folder: Path, source: Path, output: Path) -> int:
    """Runs the job, in the forked process. Returns the exit code."""
    torch.set_num_threads(1)
    # With coalescing, results would depend on the micro-batches in flight, and not be
    # equal bit for bit.
    policy = Policy(device_memory="1MiB", coalesce="off", sequences_in_flight=32)
    task: Task = Score()
    if name == "generate":
        task = Generate(3, options={"temperature": 1.0})
    done = Job(task, folder, source, output, policy).run(Console(quiet=True))
    return 0 if done.num_errors * 100 >= done.num_rows else 1


def forked(call: Callable[[], int]) -> int:
    """Forks a process that calls `call`, and returns its id."""
    pid = os.fork()
    if pid:
        return pid
    code = 70
    try:
        code = call()
    except BaseException as error:  # the child must not continue as the parent
        print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
    finally:
        os._exit(code)


def exit_code(pid: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def run_for(
    seconds: float, call: Callable[[], int], is_due: Callable[[], bool]
) -> int | None:
    """Runs `call` in a forked process, and returns its exit code.

    Returns None if it was killed first: after `seconds`, once `is_due` is true.
    """
    pid = forked(call)
    end = time.monotonic() + seconds
    while time.monotonic() < end or not is_due():
        found, status = os.waitpid(pid, os.WNOHANG)
        if found:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.0002)
    os.kill(pid, signal.SIGKILL)
    code = exit_code(pid)
    return None if code == -signal.SIGKILL else code


def is_writing(output: Path) -> bool:
    """Whether a file of the job is partly written, or about to be removed."""
    folder = output.with_name(output.name + ".parts")
    try:
        return any(name.endswith((".new", "joined")) for name in os.listdir(folder))
    except FileNotFoundError:
        return False


def standing(output: Path) -> str:
    """A description of what is on disk."""
    folder = output.with_name(output.name + ".parts")
    if output.exists():
        return "the output, and what is to be removed" if folder.exists() else "all"
    if not (folder / "manifest.json").exists():
        return "nothing yet"
    names = os.listdir(folder)
    if any(name.startswith("joined") for name in names):
        return "the output half joined"
    if any(name.endswith(".new") for name in names):
        return "a part half written"
    return "parts" if any(name.startswith("part-") for name in names) else "a manifest"


def measure(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    model, source = folder / "model", folder / "rows.jsonl"
    quiet = Console(quiet=True)

    def make() -> int:
        models.make_checkpoint(model, "tiny", dtype="float32", console=quiet)
        return 0

    assert exit_code(forked(make)) == 0, "the model could not be made"
    write_rows(source, args.rows, args.seed)
    whole = folder / "whole.jsonl"
    start = time.monotonic()
    code = exit_code(forked(lambda: run_job(args.task, model, source, whole)))
    seconds = time.monotonic() - start
    assert code == 0, "the undisturbed job failed"
    expected = whole.read_bytes()
    assert len(expected.splitlines()) == args.rows, "a result for each row"

    drawn = random.Random(args.seed)
    found: Counter[str] = Counter()
    num_kills = num_jobs = num_different = 0
    begin = time.monotonic()
    while num_kills < args.kills:
        output = folder / f"out-{num_jobs}.jsonl"
        run = partial(run_job, args.task, model, source, output)
        while True:
            # After the last kill, the job may finish.
            is_last = num_kills == args.kills
            lives = 3600 if is_last else drawn.uniform(0, seconds)
            is_aimed = drawn.random() < 0.5
            due = partial(is_writing, output) if is_aimed else lambda: True
            ended = run_for(lives, run, due)
            if ended is not None:
                break
            num_kills += 1
            found[standing(output)] += 1
        num_jobs += 1
        is_same = ended == 0 and output.read_bytes() == expected
        num_different += not is_same
        if not is_same:
            print(f"DIFFERS: {output} (exit code {ended})", file=sys.stderr)
            shutil.copytree(folder, args.keep, dirs_exist_ok=True)
        output.unlink(missing_ok=True)
        print(f"{num_kills} kills, {num_jobs} jobs, {num_different} differ", flush=True)
    return {
        "task": args.task,
        "rows": args.rows,
        "kills": num_kills,
        "jobs": num_jobs,
        "jobs_that_differ": num_different,
        "undisturbed_seconds": round(seconds, 2),
        "seconds": round(time.monotonic() - begin, 1),
        "output_bytes": len(expected),
        "on_disk_when_killed": dict(found.most_common()),
    }


def main() -> int:
    parser = frame.parser(__doc__)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--rows", type=int, help="(default: 5000; generate: 320)")
    parser.add_argument("--task", choices=sorted(NUM_ROWS), default="score")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--keep",
        type=Path,
        default=Path(tempfile.gettempdir()) / "penstock-kills",
        help="folder for what differed",
    )
    args = parser.parse_args()
    args.rows = args.rows or NUM_ROWS[args.task]
    with frame.scratch() as folder:
        found = measure(args, folder)
    return frame.finish(found, is_good=not found["jobs_that_differ"])


if __name__ == "__main__":
    sys.exit(main())

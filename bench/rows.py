"""Scores a million short rows: does memory stay flat, and what is the overhead of a
row?

    python bench/rows.py [--rows 1000000] [--model bench/out/llama-1.1b] [--slice 512]

Scores `--rows` rows of one to eight words with a model of 0.2M parameters, as a job of
the command line does, and samples the resident memory of the process. After the first
tenth it must stay within 5 %. The whole time of that job counts as overhead, including
the work of its small model. Then the first `--slice` of the same rows are scored with
`--model` (1.1B parameters, made if it does not exist), in float32 if this CPU has no
bfloat16. The overhead must be under 3 % of the time of a row there. The last line is
one JSON object; the exit code is 1 if one of the two does not hold.

Takes about a quarter of an hour; needs 3 GB of disk and 4 GB of memory.
"""

from __future__ import annotations

import argparse
import random
import sys
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import torch
from rich.console import Console

from common import frame, machine, models
from penstock import Policy
from penstock.offload.jobs.job import Job
from penstock.offload.tasks.score_task import Score
from penstock.offload.tasks.task_progress import ScoreProgress

MAX_GROWTH = 0.05
MAX_OVERHEAD = 0.03
WARM = 0.1
_SAMPLE_SECONDS = 0.02
WORDS = ("river", "stone", "wind", "paper", "light", "slow", "green", "under", "walk")


@dataclass(frozen=True)
class Watched(Score):
    """Scoring, of which another thread may see how far it is."""

    progress: ScoreProgress = field(default_factory=ScoreProgress)

    def new_progress(self) -> ScoreProgress:
        return self.progress


class Memory:
    """Samples the resident bytes of this process in a thread, with the progress of the
    job."""

    def __init__(self, task: Watched) -> None:
        self._task = task
        self._process = psutil.Process()
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)
        self.samples: list[tuple[int, int]] = []
        """(rows done, resident bytes) of each sample."""

    def __enter__(self) -> Memory:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._end.set()
        self._thread.join()

    def _sample(self) -> None:
        while not self._end.wait(_SAMPLE_SECONDS):
            done = self._task.progress.rows_done
            self.samples.append((done, self._process.memory_info().rss))


def write_rows(path: Path, num_rows: int) -> None:
    drawn = random.Random(0)
    with path.open("w") as file:
        for number in range(num_rows):
            text = " ".join(drawn.choices(WORDS, k=drawn.randint(1, 8)))
            file.write(f'{{"id": {number}, "text": "{text}"}}\n')


def score(
    model: Path, source: Path, output: Path, policy: Policy
) -> tuple[dict[str, Any], list[tuple[int, int]], float]:
    """The report of a job, its memory samples, and its seconds from reading to the
    end."""
    task = Watched()
    start = time.perf_counter()
    with Memory(task) as memory:
        job = Job(task, model, source, output, policy, mode="restart")
        done = job.run(Console(quiet=True))
    seconds = time.perf_counter() - start
    assert done.report is not None, "a job that begins anew does all its rows"
    return done.report, memory.samples, seconds - done.report["load_seconds"]


def growth(samples: list[tuple[int, int]], num_rows: int) -> float:
    """How far memory varies once it is warm: half of the difference between the most
    and the least, as a share of their mean."""
    warm = [nbytes for done, nbytes in samples if done >= WARM * num_rows]
    assert len(warm) >= 10, "too short a run: more rows"
    return (max(warm) - min(warm)) / (max(warm) + min(warm))


def measure(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    quiet = Console(quiet=True)
    source, part = folder / "rows.jsonl", folder / "slice.jsonl"
    write_rows(source, args.rows)
    with source.open() as lines:
        part.write_text("".join(next(lines) for _ in range(args.slice)))
    tiny = models.make_checkpoint(
        folder / "tiny", "tiny", dtype="float32", console=quiet
    )
    small = Policy(device_memory="1MiB")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the work is too small for several threads
    report, samples, seconds = score(tiny, source, folder / "out.jsonl", small)
    torch.set_num_threads(threads)
    spread = growth(samples, args.rows)
    each = seconds / args.rows
    found: dict[str, Any] = {
        "machine": machine.card(folder),
        "rows": args.rows,
        "tokens": report["tokens"],
        "seconds": round(seconds, 2),
        "overhead_seconds_per_row": each,
        "resident_bytes": samples[-1][1],
        "resident_spread": round(spread, 4),
        "resident_bytes_by_tenth": by_tenth(samples, args.rows),
    }
    print(f"{seconds:.1f} s, {each * 1e6:.0f} us a row, memory +-{spread:.1%}")
    if args.slice:
        frame.checkpoint(args.model, "1.1b")
        large = Policy(device_memory=args.device_memory)
        report, _, seconds = score(args.model, part, folder / "part.jsonl", large)
        found["slice_rows"] = args.slice
        found["slice_tokens"] = report["tokens"]
        found["slice_seconds_per_row"] = seconds / args.slice
        found["overhead"] = round(each / (seconds / args.slice), 5)
        print(f"{seconds / args.slice * 1e3:.1f} ms a row: {found['overhead']:.2%}")
    return found


def by_tenth(samples: list[tuple[int, int]], num_rows: int) -> list[int]:
    """The most resident bytes in each tenth of the job."""
    most = [0] * 10
    for done, nbytes in samples:
        tenth = min(done * 10 // num_rows, 9)
        most[tenth] = max(most[tenth], nbytes)
    return most


def main() -> int:
    parser = frame.parser(__doc__)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument(
        "--model", type=Path, default=frame.BENCH / "out" / "llama-1.1b"
    )
    parser.add_argument("--slice", type=int, default=512, help="0: without the model")
    parser.add_argument("--device-memory", default="2GiB")
    args = parser.parse_args()
    with frame.scratch() as folder:
        found = measure(args, folder)
    is_flat = found["resident_spread"] <= MAX_GROWTH
    is_cheap = found.get("overhead", 0) <= MAX_OVERHEAD
    return frame.finish(found, is_good=is_flat and is_cheap)


if __name__ == "__main__":
    sys.exit(main())

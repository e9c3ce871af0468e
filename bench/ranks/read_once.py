"""Two workers on one drive: how much faster are they if they read it once for both?

    python bench/ranks/read_once.py [--workers 2] [--rate 50MB] [--pairs 3]

Makes a Llama of 8 blocks (100 MB) in `bench/out`. All processes read it from one drive
of `--rate`, which a lock file keeps: their reads wait for each other. A job scores the
same rows with `--workers` processes that each read everything (`io.read_once: false`),
and with as many that share what they read, in turns, `--pairs` times. The ceiling is
the number of workers. The drive counts its bytes: shared, they should be those that one
of the workers reads alone. One process, on a drive as fast as it is, says what the
output must be. The last line is one JSON object; the exit code is 1 if outputs differ,
if the median of the ratios is below 1.7 for two workers (0.85 a worker), or if the
drive gave more than 1.05 times the bytes of one worker.

Takes four minutes a pair; needs 0.2 GB of disk in this folder, O_DIRECT there,
and two cores that others leave alone.
"""

from __future__ import annotations

import json
import statistics
import sys
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parents[1]))

from rich.console import Console

from common import frame, models
from common.paced_drive import PacedDrive, PacedScore
from penstock import Policy
from penstock.offload.jobs.job import Job
from penstock.offload.tasks.score_task import Score

OUT = Path(__file__).parents[1] / "out"
LEAST, MOST_BYTES = 0.85, 1.05


def make(folder: Path) -> Path:
    if not (folder / "tokenizer.json").exists():
        models.llama(
            folder,
            vocab_size=models.SIZES["tiny"].vocabulary,
            hidden_size=512,
            intermediate_size=1536,
            num_hidden_layers=8,
            num_attention_heads=8,
            num_key_value_heads=4,
        )
        models.write_tokenizer(folder, models.SIZES["tiny"])
    return folder


def write_rows(path: Path, num_rows: int) -> None:
    text = "the river runs over the stones of the valley "
    rows = [{"id": n, "text": f"{n % 10} {text}"} for n in range(num_rows)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def policy_of(*, read_once: bool) -> Policy:
    """A pass takes 64 tokens, whose computing is short beside the reads; a part takes
    about thirty passes."""
    return Policy(
        device_memory="48MiB",
        gather_rows="1KiB",
        micro_batch_tokens=32,
        tokens_in_flight=64,
        io={"reader": "threads", "cache": OUT / "cache", "read_once": read_once},
    )


def run(
    drive: PacedDrive, folder: Path, source: Path, output: Path, num: int, once: bool
) -> dict[str, Any]:
    """What a job with `num` workers took, and its output."""
    drive.reset()
    policy = policy_of(read_once=once)
    task = PacedScore(drive=drive) if num > 1 else Score()
    job = Job(task, folder, source, output, policy, workers=num)
    report = job.run(Console(quiet=True)).report
    assert report is not None, "there was something to do"
    found = {
        "seconds": report["seconds"],
        "drive": drive.num_bytes,
        "shared": report["bytes_shared"],
        "passes": report["passes"],
        "fallbacks": report["fallbacks"],
        "output": output.read_bytes(),
    }
    output.unlink()
    return found


def main() -> int:
    parser = frame.parser(__doc__)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--rate", default="50MB")
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--rows", type=int, default=120)
    options = parser.parse_args()
    rate = Policy(links={"disk": {"bandwidth": options.rate}}).links["disk"].bandwidth
    folder = make(OUT / "read_once")
    ratios, shares = [], []
    with frame.scratch(parent=OUT) as work:
        source, output = work / "rows.jsonl", work / "out.jsonl"
        write_rows(source, options.rows)
        drive = PacedDrive(work / "drive", rate)
        expected = run(drive, folder, source, output, 1, False)["output"]
        print("| workers | seconds | from the drive | of one | shared | passes |")
        print("|---|---|---|---|---|---|")
        is_same = True
        for _ in range(options.pairs):
            how = (drive, folder, source, output, options.workers)
            each, once = run(*how, False), run(*how, True)
            is_same &= each["output"] == once["output"] == expected
            ratios.append(each["seconds"] / once["seconds"])
            of_one = each["drive"] / options.workers
            shares.append(once["drive"] / of_one)
            for name, found in (("read all", each), ("read once", once)):
                drive_mb, shared_mb = found["drive"] / 1e6, found["shared"] / 1e6
                print(
                    f"| {name} | {found['seconds']:.1f} | {drive_mb:.0f} MB "
                    f"| {found['drive'] / of_one:.3f} | {shared_mb:.0f} MB "
                    f"| {found['passes']} |",
                    flush=True,
                )
    ratio = statistics.median(ratios)
    figures = {
        "median": ratio,
        "ratios": ratios,
        "bytes_of_one_worker": shares,
        "same": is_same,
    }
    is_good = is_same and ratio >= LEAST * options.workers and max(shares) <= MOST_BYTES
    return frame.finish(figures, is_good=is_good)


if __name__ == "__main__":
    sys.exit(main())

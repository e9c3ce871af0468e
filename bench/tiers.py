"""Compares each reader with the drive's own speed, and the host tier with a plain copy
of memory, in one run.

Regime: large sequential reads of a file that is not cached, as in streaming: the reader
is open, and the memory of its slots was touched before. The ceiling is the better of
fio with O_DIRECT, if it is installed, and a plain loop of O_DIRECT preadv calls into
the same memory (huge pages), over the same file, with the same size and depth. Both
take turns with the readers in each round, so that a slow minute affects all. Shown are
medians (also of the shares of each round's ceiling), and CPU seconds for each GB.

    python bench/tiers.py

writes `tiers.json` and `tiers.png` to bench/out and prints a table; the last line is
one JSON object.

Takes about five minutes; needs 4 GiB of a real drive, 3 GiB of memory and matplotlib.
"""

import argparse
import mmap
import os
import shutil
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from common import copying, frame, machine
from common.read_methods import Case, by_reader, fio, make_file, plain_loop, reader_of
from penstock.io.checkpoint.header import FileStamp
from penstock.io.memory.arena import Arena
from penstock.io.memory.shared import SharedArena
from penstock.io.readers import libaio_reader as aio
from penstock.io.readers.choice import best_of, measure
from penstock.offload.settings.values import parse_bytes

SLOT_BYTES = 256 << 20
"""Bytes of the memory that is read into repeatedly, like a slot."""


Way = Callable[[Path, Case, Arena], float | None]


@dataclass(frozen=True)
class Result:
    way: str
    chunk_bytes: int
    depth: int
    bytes_per_second: float
    spread: tuple[float, float]
    cpu_seconds_per_gb: float
    of_ceiling: float | None


def timed(act: Callable[[], float | None], path: Path) -> tuple[float, float]:
    """(bytes per second, CPU seconds) of reading the file, which is not cached.

    `act` may return its own rate. CPU seconds include those of child processes.
    """
    machine.evict(path)
    used, start = sum(os.times()[:4]), time.perf_counter()
    rate = act()
    seconds = time.perf_counter() - start
    return rate or path.stat().st_size / seconds, sum(os.times()[:4]) - used


def run(args: argparse.Namespace, path: Path) -> list[Result]:
    ceilings: dict[str, Way] = {"plain loop": plain_loop}
    if shutil.which("fio"):
        ceilings["fio"] = fio
    readers = ["threads", "aiofiles"]
    if args.plain_only:
        ceilings, readers = {"plain loop": plain_loop}, ["threads"]
    if (reason := aio.why_not()) is None:
        readers.append("libaio")
    else:
        print(f"NO libaio: {reason}")
    cases = [
        Case(way, parse_bytes(chunk), depth)
        for chunk in args.chunks
        for depth in args.depths
        for way in (*ceilings, *readers)
    ]
    rates: dict[Case, list[float]] = defaultdict(list)
    costs: dict[Case, list[float]] = defaultdict(list)
    with Arena(SLOT_BYTES) as arena:
        arena.tensor(0, SLOT_BYTES).zero_()
        for number in range(args.rounds):
            for case in cases[:: -1 if number % 2 else 1]:
                way = ceilings.get(case.way, by_reader)
                rate, cpu = timed(partial(way, path, case, arena), path)
                rates[case].append(rate)
                costs[case].append(cpu / path.stat().st_size * 1e9)
                print(f"round {number}: {case}: {rate / 1e9:.3f} GB/s", flush=True)
    medians = {case: statistics.median(found) for case, found in rates.items()}
    return [
        Result(
            case.way,
            case.chunk_bytes,
            case.depth,
            medians[case],
            (min(rates[case]), max(rates[case])),
            statistics.median(costs[case]),
            None
            if case.way in ceilings
            else statistics.median(
                mine / best
                for mine, best in zip(
                    rates[case],
                    _ceiling_by_round(rates, case, set(ceilings)),
                    strict=True,
                )
            ),
        )
        for case in cases
    ]


def _ceiling_by_round(
    rates: dict[Case, list[float]], case: Case, ceilings: set[str]
) -> list[float]:
    """The rate of the better ceiling at this size and depth, in each round."""
    same = [
        found
        for other, found in rates.items()
        if other.way in ceilings
        and (other.chunk_bytes, other.depth) == (case.chunk_bytes, case.depth)
    ]
    return [max(values) for values in zip(*same, strict=True)]


def auto(path: Path) -> dict[str, Any]:
    """The reader that `io.reader: auto` would choose here, and the figures for that."""
    stamps = {path: FileStamp.of(path.stat())}
    names = ["threads"] + (["libaio"] if aio.why_not() is None else [])
    makers = {
        name: partial(
            reader_of, path, Case(name, 8 << 20, 2 if name == "threads" else 8)
        )
        for name in names
    }
    machine.evict(path)
    start = time.perf_counter()
    trials = measure(makers, stamps)
    seconds = time.perf_counter() - start
    return {
        "chosen": best_of(trials).reader if trials else None,
        "seconds": seconds,
        "trials": [asdict(trial) for trial in trials],
    }


def arenas(nbytes: int) -> dict[str, dict[str, int]]:
    """The bytes that arenas take, and the bytes that were requested."""
    import psutil

    process = psutil.Process()
    found = {}
    for name, make in (
        ("private", lambda: Arena(nbytes)),
        ("shared", lambda: SharedArena(f"bench {os.getpid()}", nbytes, lambda _: None)),
    ):
        before = process.memory_info().rss
        with make() as arena:
            view = arena.view(0, nbytes)
            for page in range(0, nbytes, mmap.PAGESIZE):
                view[page] = 1
            taken = process.memory_info().rss - before
            view.release()
        found[name] = {"asked_bytes": nbytes, "resident_bytes": taken}
    return found


def plot(results: list[Result], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    depths = sorted({result.depth for result in results})
    figure, axes = pyplot.subplots(
        1, len(depths), figsize=(4.2 * len(depths), 4), sharey=True, squeeze=False
    )
    for axis, depth in zip(axes[0], depths, strict=True):
        for way in dict.fromkeys(result.way for result in results):
            mine = [r for r in results if r.way == way and r.depth == depth]
            axis.plot(
                [r.chunk_bytes / 2**20 for r in mine],
                [r.bytes_per_second / 1e9 for r in mine],
                marker="o",
                linestyle="--" if mine[0].of_ceiling is None else "-",
                label=way,
            )
        axis.set_title(f"{depth} reads under way")
        axis.set_xscale("log", base=2)
        axis.set_xlabel("MiB a read")
        axis.set_ylim(bottom=0)
        axis.grid(alpha=0.3)
    axes[0][0].set_ylabel("GB/s, cold file (dashed: ceiling)")
    axes[0][-1].legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def show(results: list[Result]) -> None:
    print(
        f"\n{'':12}{'MiB':>6}{'depth':>7}{'GB/s':>8}{'low':>7}{'high':>7}"
        f"{'ceiling':>9}{'CPU s/GB':>10}"
    )
    for r in results:
        share = "-" if r.of_ceiling is None else f"{r.of_ceiling:.1%}"
        low, high = r.spread
        print(
            f"{r.way:12}{r.chunk_bytes / 2**20:6g}{r.depth:7}"
            f"{r.bytes_per_second / 1e9:8.3f}{low / 1e9:7.2f}{high / 1e9:7.2f}"
            f"{share:>9}{r.cpu_seconds_per_gb:10.3f}"
        )


def show_copied(copied: list[copying.Copied]) -> None:
    print(f"\n{'copied from':24}{'GB/s':>8}{'low':>7}{'high':>7}{'ceiling':>9}")
    for c in copied:
        share = "-" if c.of_ceiling is None else f"{c.of_ceiling:.1%}"
        low, high = (rate / 1e9 for rate in c.spread)
        rate = c.bytes_per_second / 1e9
        print(f"{c.memory:24}{rate:8.2f}{low:7.2f}{high:7.2f}{share:>9}")
    print()


def main() -> int:
    parser = frame.parser(__doc__)
    parser.add_argument("--file", type=Path, help="made when it is not there")
    parser.add_argument("--size", default="4GiB")
    parser.add_argument("--chunks", nargs="+", default=["1MiB", "8MiB", "32MiB"])
    parser.add_argument("--depths", nargs="+", type=int, default=[2, 8])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--plain-only", action="store_true", help="no fio, no aiofiles: more rounds"
    )
    parser.add_argument("--out", type=Path, default=frame.BENCH / "out")
    args = parser.parse_args()
    path = (args.file or args.out / "tiers.bin").resolve()
    args.out.mkdir(parents=True, exist_ok=True)
    facts = frame.card(args.out)
    make_file(path, parse_bytes(args.size))
    results = run(args, path)
    choice = auto(path)
    memory = arenas(min(1 << 30, parse_bytes(args.size)))
    copied = copying.run(path, args.rounds)
    show(results)
    show_copied(copied)
    print(f"auto chooses {choice['chosen']} in {choice['seconds']:.2f} s")
    for name, found in memory.items():
        share = found["resident_bytes"] / found["asked_bytes"]
        print(f"{name} arena: {share:.4f} of the bytes asked for are resident")
    plot(results, args.out / "tiers.png")
    result = {
        "machine": facts,
        "results": [asdict(r) for r in results],
        "auto": choice,
        "arenas": memory,
        "copied": [asdict(c) for c in copied],
    }
    return frame.finish(result, out=args.out / "tiers.json")


if __name__ == "__main__":
    sys.exit(main())

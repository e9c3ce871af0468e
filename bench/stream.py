"""Compares streamed with resident models, and with other libraries, on one checkpoint
in one run.

Regime: scoring with thousands of tokens in flight, so compute-bound if streaming keeps
up. The ceiling is the time of the matrix products at the measured rate, or of reading
the weights once at the measured O_DIRECT rate, whichever is more.

Every run is a process of its own, and the checkpoint is removed from the page cache
before it. Contenders take turns, medians are shown, and with each time counts that do
not vary. Streamed and resident log-probabilities are compared bit for bit. The last
line of the output is one JSON object.

    python bench/stream.py [--model CHECKPOINT] [--peers accelerate airllm deepspeed]

makes a 3B checkpoint once. Peers run in environments of their own (made by `python
bench/peers/make_envs.py`).

Takes about half an hour on two cores; needs 6 GB of a real drive, and 8 GB of memory
(float32: 18) for the resident model, which `--no-resident` leaves out.
"""

import argparse
import json
import mmap
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch

from common import frame, machine
from common.turns import add_options, in_turns, prepare
from penstock.io.checkpoint.index import open_checkpoint
from penstock.io.extent import Extent, align_up
from penstock.io.fallbacks import Fallbacks
from penstock.io.readers.threads import ThreadReader
from penstock.offload.settings.values import parse_bytes


def make_tokens(path: Path, vocabulary: int, tokens: int, rows: int, width: int) -> int:
    """Writes micro-batches of `rows` x `width` random ids, `tokens` in all. Returns the
    number of micro-batches."""
    generator = torch.Generator().manual_seed(0)
    count = max(1, tokens // (rows * width))
    ids = torch.randint(5, vocabulary, (count, rows, width), generator=generator)
    path.write_text(json.dumps({"batches": ids.tolist()}))
    return count


def disk_bytes_per_second(model: Path, limit_bytes: int = 2 << 30) -> float:
    """Bytes per second of sequential O_DIRECT reads of the checkpoint, by two threads,
    8 MiB each."""
    checkpoint = open_checkpoint(model)
    buffer = memoryview(mmap.mmap(-1, 256 << 20))
    read, start = 0, time.perf_counter()
    with ThreadReader(
        checkpoint.stamps,
        num_threads=2,
        chunk_bytes=8 << 20,
        direct=True,
        fallbacks=Fallbacks(),
    ) as reader:
        for path, stamp in checkpoint.stamps.items():
            for offset in range(0, stamp.size_bytes, len(buffer)):
                nbytes = min(len(buffer), align_up(stamp.size_bytes - offset, 4096))
                reader.submit(Extent(path, offset, nbytes), buffer).wait()
                read += nbytes
                if read >= limit_bytes:
                    return read / (time.perf_counter() - start)
    return read / (time.perf_counter() - start)


def commands(args: argparse.Namespace, tokens: Path) -> dict[str, list[str]]:
    """The commands that are compared, by name."""
    worker = [sys.executable, str(frame.BENCH / "common" / "stream_worker.py")]
    common = [
        "--model",
        str(args.model),
        "--tokens",
        str(tokens),
        "--dtype",
        args.dtype,
    ]
    found = {
        "penstock": [
            *worker,
            "streamed",
            *common,
            "--device-memory",
            args.device_memory,
        ]
    }
    if not args.no_resident:
        found["resident"] = [*worker, "resident", *common]
    for peer in args.peers:
        found[peer] = [
            str(frame.BENCH / "peers" / ".envs" / peer / "bin" / "python"),
            str(frame.BENCH / "peers" / f"run_{peer}.py"),
            *common,
            "--cpu-memory",
            str(parse_bytes(args.device_memory)),
        ]
    return found


def ceiling(args: argparse.Namespace, num_tokens: int, rows: int) -> dict[str, float]:
    """The seconds that this work takes at the machine's measured rates."""
    checkpoint = open_checkpoint(args.model)
    stored = checkpoint.num_bytes
    embedding = checkpoint.entries["model.embed_tokens.weight"].nbytes
    size = checkpoint.entries["model.embed_tokens.weight"].dtype.itemsize
    parameters = (stored - embedding) / size  # rows are looked up, not multiplied
    dtype = getattr(torch, args.dtype)
    flops = machine.matmul_flops_per_second(rows, dtype)
    disk = disk_bytes_per_second(args.model)
    compute, read = 2 * parameters * num_tokens / flops, (stored - embedding) / disk
    return {
        "matmul_flops_per_second": flops,
        "disk_bytes_per_second": disk,
        "compute_seconds": compute,
        "read_seconds": read,
        "tokens_per_second": num_tokens / max(compute, read),
    }


def summarise(name: str, runs: list[dict[str, Any]], best: float) -> dict[str, Any]:
    """Medians of one contender's runs, and the share of the ceiling."""
    good = [r for r in runs if "error" not in r]
    if not good:
        return {"name": name, "error": runs[0]["error"] if runs else "not run"}
    rates = [r["tokens_per_second"] for r in good]
    keys = (
        "seconds",
        "cpu_seconds",
        "load_seconds",
        "seconds_to_first_layer",
        "peak_rss_bytes",
        "disk_written_bytes",
        "disk_read_bytes",
        "bytes_loaded",
        "wait_seconds",
    )
    found: dict[str, Any] = {
        "name": name,
        "tokens_per_second": statistics.median(rates),
        "spread": [min(rates), max(rates)],
        "of_ceiling": statistics.median(rates) / best,
        "runs": len(good),
    }
    for key in keys:
        values = [r[key] for r in good if r.get(key) is not None]
        found[key] = statistics.median(values) if values else None
    return found


def show(rows: list[dict[str, Any]]) -> None:
    print(
        f"\n{'':12}{'tokens/s':>10}{'ceiling':>9}{'CPU s':>8}{'load s':>8}"
        f"{'first s':>9}{'peak MiB':>10}{'read MiB':>10}{'written':>9}"
    )
    for row in rows:
        if "error" in row:
            print(f"{row['name']:12}{row['error']}")
            continue

        def cell(key: str, scale: float, width: int, form: str, row: Any = row) -> str:
            value = row.get(key)
            return f"{'-' if value is None else format(value / scale, form):>{width}}"

        print(
            f"{row['name']:12}{row['tokens_per_second']:10.1f}"
            f"{row['of_ceiling']:9.1%}"
            + cell("cpu_seconds", 1, 8, ".1f")
            + cell("load_seconds", 1, 8, ".2f")
            + cell("seconds_to_first_layer", 1, 9, ".2f")
            + cell("peak_rss_bytes", 1 << 20, 10, ".0f")
            + cell("disk_read_bytes", 1 << 20, 10, ".0f")
            + cell("disk_written_bytes", 1 << 20, 9, ".0f")
        )


def parse_args() -> argparse.Namespace:
    parser = frame.parser(__doc__)
    add_options(parser, dtype="bfloat16", rounds=3)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--rows", type=int, default=4, help="rows of a micro-batch")
    parser.add_argument("--width", type=int, default=128, help="tokens of a row")
    parser.add_argument("--no-resident", action="store_true")
    parser.add_argument("--peers", nargs="*", default=[])
    parser.add_argument(
        "--unlimited", nargs="*", default=["resident"], help="run without the limit"
    )
    return parser.parse_args()


def main() -> int:
    args = parse_args()
    vocabulary, limit, facts = prepare(args)
    with frame.scratch() as folder:
        path = folder / "tokens.json"
        count = make_tokens(path, vocabulary, args.tokens, args.rows, args.width)
        num_tokens = count * args.rows * args.width
        best = ceiling(args, num_tokens, args.rows * args.width)
        print(f"ceiling: {json.dumps(best)}")
        contenders = commands(args, path)
        limits_of = {n: None if n in args.unlimited else limit for n in contenders}
        runs = in_turns(
            contenders, args.model, limits_of, args.rounds, rate="tokens_per_second"
        )
    rate = best["tokens_per_second"]
    rows = [summarise(name, found, rate) for name, found in runs.items()]
    show(rows)
    equal = _equal(runs)
    if equal is not None:
        print(f"streamed log-probabilities equal resident, bit for bit: {equal}")
    result = {
        "machine": facts,
        "settings": frame.settings(args),
        "ceiling": best,
        "results": rows,
        "bit_identical": equal,
    }
    return frame.finish(result)


def _equal(runs: dict[str, list[dict[str, Any]]]) -> bool | None:
    """Whether all runs gave the same sums; prints which rows of which run did not."""
    sums = {
        f"{name}, round {number}": found["logprob_sums"]
        for name in ("penstock", "resident")
        for number, found in enumerate(runs.get(name, []))
        if "logprob_sums" in found
    }
    if "resident" not in runs or len(sums) < 2:
        return None
    first = next(iter(sums.values()))
    is_equal = True
    for run_name, found in sums.items():
        rows = [
            i
            for i, pair in enumerate(zip(found, first, strict=True))
            if len({*pair}) > 1
        ]
        if rows:
            is_equal = False
            print(f"DIFFERS from the first run: {run_name}, rows {rows}")
    return is_equal


if __name__ == "__main__":
    sys.exit(main())

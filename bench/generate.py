"""Compares completions: streamed with resident, refilled with fixed batches, and with
accelerate's disk offload, on one checkpoint in one run.

Regime: `--prompt`/`--new` tokens (such as 64/16, 128/128, 512/32), `--sequences` in
flight. The ceiling is the sum over all passes of the time for the matrix products of
their tokens at the measured rate, or for reading the weights once at the measured
O_DIRECT rate, whichever is more. Keys and values on disk share its drive ("alone" is
the ceiling if they had a drive of their own). The rates of machines vary. So they are
measured before and after all runs, and during each run, which is stopped (and its clock
too) for three seconds of every thirty. A run that is long enough for that has a ceiling
from its own rates. Output tokens and all tokens per second are shown separately, with
counts that do not vary: passes, and weight bytes for each output token.

Every run is a process of its own, and the checkpoint is removed from the page cache
before it. Contenders take turns, and medians are shown. Greedy completions are compared
with those of the resident model, token for token. The last line is one JSON object.

    python bench/generate.py --contenders streamed resident --prompt 64 --new 16
    python bench/generate.py --contenders streamed fixed --tail --rows 512

With `--tail`, one token in so many ends a completion: most are short, some are long,
and they are the same for all contenders. With `--ragged`, the lengths of prompts are
drawn between half of `--prompt` and all of it.

Takes five to fifteen minutes for each contender and round on two cores; needs 6 GB of
a real drive, and 18 GB of memory where `resident` is one of the contenders.
"""

import argparse
import json
import statistics
import sys
from dataclasses import asdict
from functools import partial
from pathlib import Path
from random import Random
from typing import Any

import torch

from common import frame, machine
from common.beside import Beside
from common.generate_ceiling import Rates, Size, ceiling
from common.turns import add_options, in_turns, prepare
from stream import disk_bytes_per_second

AROUND_BYTES, BESIDE_BYTES = 2 << 30, 768 << 20
"""Bytes that a probe reads from the drive, around all runs and during one."""


def make_work(args: argparse.Namespace, vocabulary: int) -> dict[str, Any]:
    random = Random(0)
    shortest = args.prompt // 2 if args.ragged else args.prompt
    prompts = [
        [
            random.randrange(5, vocabulary)
            for _ in range(random.randint(shortest, args.prompt))
        ]
        for _ in range(args.rows or args.sequences)
    ]
    ends = (
        random.sample(range(5, vocabulary), vocabulary // args.tail)
        if args.tail
        else []
    )
    return {"prompts": prompts, "new_tokens": args.new, "ends": ends}


def commands(args: argparse.Namespace, work: Path) -> dict[str, list[str]]:
    """The commands that are compared, by name."""
    common = ["--model", str(args.model), "--work", str(work), "--dtype", args.dtype]
    settings = [
        f"device_memory={args.device_memory}",
        f"sequences_in_flight={args.sequences}",
        *args.set,
    ]
    found = {}
    for name in args.contenders:
        mode, _, setting = name.partition(":")
        if mode == "accelerate":
            python = frame.BENCH / "peers" / ".envs" / mode / "bin" / "python"
            script = frame.BENCH / "peers" / f"generate_{mode}.py"
            given = {"cpu-memory": args.device_memory}
            given |= dict(part.split("=", 1) for part in setting.split(":") if part)
            flags = [f"--{key}={value}" for key, value in given.items()]
            found[name] = [str(python), str(script), *common, *flags]
            continue
        script = frame.BENCH / "common" / "generate_worker.py"
        worker = [sys.executable, str(script), mode, *common]
        extra = setting.split(":") if setting else []
        found[name] = [*worker, "--set", *settings, *extra]
    return found


def rates(args: argparse.Namespace, work: dict[str, Any], read_bytes: int) -> Rates:
    dtype = getattr(torch, args.dtype)
    rows = min(args.sequences, len(work["prompts"]))
    return Rates(
        machine.sustained_flops_per_second(512, dtype),
        machine.sustained_flops_per_second(rows, dtype),
        disk_bytes_per_second(args.model, read_bytes),
    )


def summarise(name: str, runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Medians of one contender's runs."""
    good = [r for r in runs if "error" not in r]
    if not good:
        return {"name": name, "error": runs[0]["error"] if runs else "not run"}
    found: dict[str, Any] = {"name": name, "runs": len(good)}
    keys = (
        "output_tokens",
        "output_tokens_per_second",
        "tokens_per_second",
        "seconds",
        "cpu_seconds",
        "stopped_seconds",
        "load_seconds",
        "passes",
        "bytes_loaded",
        "wait_seconds",
        "kv_wait_seconds",
        "peak_rss_bytes",
    )
    for key in keys:
        values = [r[key] for r in good if r.get(key) is not None]
        found[key] = statistics.median(values) if values else None
    if found["bytes_loaded"] is not None:
        found["bytes_per_token"] = found["bytes_loaded"] / found["output_tokens"]
    return found


def show(rows: list[dict[str, Any]]) -> None:
    print(
        f"\n{'':34}{'out tok/s':>10}{'tok/s':>9}{'seconds':>9}{'ceiling':>9}"
        f"{'alone':>7}{'CPU s':>8}{'passes':>8}{'MB/token':>10}{'peak MiB':>10}"
    )
    for row in rows:
        if "error" in row:
            print(f"{row['name']:34}{row['error']}")
            continue
        each = row.get("bytes_per_token")
        share, alone = (
            "-" if best is None else f"{best / row['seconds']:.1%}"
            for best in (row["ceiling_seconds"], row["ceiling_seconds_apart"])
        )
        print(
            f"{row['name']:34}{row['output_tokens_per_second']:10.2f}"
            f"{row['tokens_per_second']:9.1f}{row['seconds']:9.1f}"
            f"{share:>9}{alone:>7}{row['cpu_seconds']:8.1f}"
            f"{'-' if row['passes'] is None else row['passes']:>8}"
            f"{'-' if each is None else format(each / 1e6, '.2f'):>10}"
            f"{row['peak_rss_bytes'] / 2**20:10.0f}"
        )


def equal(runs: dict[str, list[dict[str, Any]]]) -> dict[str, float] | None:
    """The share of completions that equal those of the resident model, by contender."""
    if not (known := [r for r in runs.get("resident", []) if "error" not in r]):
        return None
    wanted = known[0]["completions"]
    return {
        f"{name}, round {number}": sum(
            a == b for a, b in zip(found["completions"], wanted, strict=True)
        )
        / len(wanted)
        for name, each in runs.items()
        for number, found in enumerate(each)
        if "completions" in found
    }


def parse_args() -> argparse.Namespace:
    parser = frame.parser(__doc__)
    add_options(parser, dtype="float32", rounds=1)
    parser.add_argument(
        "--contenders",
        nargs="+",
        default=["streamed", "resident"],
        help="streamed, fixed (batch after batch), resident, accelerate; "
        "streamed:key=value:key=value has these settings, too; "
        "accelerate:batch=64:cpu-memory=512MiB these instead of its own",
    )
    parser.add_argument("--prompt", type=int, default=64, help="tokens of a prompt")
    parser.add_argument("--new", type=int, default=16, help="tokens of a completion")
    parser.add_argument("--sequences", type=int, default=256, help="in flight")
    parser.add_argument("--rows", type=int, help="prompts in all (default: in flight)")
    parser.add_argument("--ragged", action="store_true")
    parser.add_argument("--tail", type=int, default=0, help="mean length of the tail")
    parser.add_argument("--set", nargs="*", default=[], help="more of the policy")
    return parser.parse_args()


def main() -> int:
    args = parse_args()
    vocabulary, limit, facts = prepare(args)
    with frame.scratch() as folder:
        work = make_work(args, vocabulary)
        path = folder / "work.json"
        path.write_text(json.dumps(work))
        size = Size.of(args.model, getattr(torch, args.dtype))
        lengths = list(map(len, work["prompts"]))
        of_rates = partial(ceiling, size, lengths, args.new, args.sequences)
        around = [rates(args, work, AROUND_BYTES)]
        before = of_rates(around[0], kv_on_disk=False)
        print(f"before: {json.dumps(before)}", flush=True)
        contenders = commands(args, path)
        limits_of = {name: None if name == "resident" else limit for name in contenders}
        probe = partial(rates, args, work, BESIDE_BYTES)
        beside = {name: Beside(probe) for name in contenders}
        runs = in_turns(
            contenders,
            args.model,
            limits_of,
            args.rounds,
            rate="output_tokens_per_second",
            beside=beside,
        )
        around.append(rates(args, work, AROUND_BYTES))
        print(f"after: {json.dumps(of_rates(around[1], kv_on_disk=False))}")
    ceilings = {
        name: of_rates(
            Rates.mean(found.samples or around),
            kv_on_disk="kv.tier=disk" in [*args.set, *name.split(":")],
        )
        for name, found in beside.items()
    }
    rows = [summarise(name, found) for name, found in runs.items()]
    for row in rows:  # completions that end early have no ceiling
        best = ceilings[row["name"]]
        row["ceiling_seconds"] = None if args.tail else best["seconds"]
        row["ceiling_seconds_apart"] = None if args.tail else best["seconds_apart"]
    show(rows)
    shares = equal(runs)
    if shares is not None:
        print(f"share of completions that are the resident model's: {shares}")
    result = {
        "machine": facts,
        "settings": frame.settings(args),
        "ceilings": ceilings,
        "beside": {n: [asdict(r) for r in b.samples] for n, b in beside.items()},
        "results": rows,
        "equal": shares,
    }
    return frame.finish(result)


if __name__ == "__main__":
    sys.exit(main())

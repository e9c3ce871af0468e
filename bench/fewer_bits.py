"""Streams the same weights in bfloat16 and in fewer bits.

Makes a Llama with blocks of the 3B shape, converts it by `penstock convert`, and runs
each kind in turns, two passes at a time: few sequences over a link of limited speed
(`--link`), and many tokens with the link as fast as the drive. Shown are, per pass, as
shares of bfloat16's: the bytes that were read, the CPU seconds of decoding, and tokens
a second; and the loops that decode beside the cast, in one thread. Ceiling of
the slow link: the bytes that bfloat16 reads over those that the kind reads.

    python bench/fewer_bits.py [--kinds fp8 int8 int4 lossless] [--layers 6]

The last line of the output is one JSON object.

Takes about five minutes; needs 4 GB of disk in the temporary folder and 6 GB of memory.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # as the command line does

import torch

import penstock
from common import decoding, frame, machine, models
from penstock import Policy
from penstock.io.timeline import CASTING
from penstock.offload.model import engine_of
from penstock.offload.policy import IO, cache_folder

CONFIG: dict[str, Any] = {
    "vocab_size": 2048,
    "hidden_size": 3072,
    "intermediate_size": 8192,
    "num_attention_heads": 24,
    "num_key_value_heads": 8,
    "head_dim": 128,
}
GROUPS = {"int4": ["--group", "128"], "int4-g32": ["--group", "32"]}
_LAPS = 2
FEW, MANY = (4, 1), (8, 64)
"""Rows and tokens of each: those that a link binds, and those that computing binds."""


@dataclass(frozen=True)
class Pass:
    """A pass of one kind: seconds, and bytes."""

    kind: str
    work: str
    round: int
    seconds: float
    cpu_seconds: float
    decode_seconds: float
    read_bytes: float
    tokens_per_second: float


def main() -> None:
    args = parse_args()
    torch.set_num_threads(args.threads)
    with frame.scratch(args.work) as folder:
        card = machine.card(folder)
        decodes = decoding.over_casting(cache_folder(IO()))
        folders = checkpoints(folder, args.kinds, args.layers)
        passes = [
            *measured(folders, args, FEW, "few sequences", args.link),
            *measured(folders, args, MANY, "many tokens", None),
        ]
    print(table(passes, args))
    print("\n| one thread | over casting bfloat16 to float32 |\n|---|---|")
    for name, ratio in decodes.items():
        print(f"| {name} | {ratio:.2f} |")
    result = {
        "machine": card,
        "passes": [asdict(p) for p in passes],
        "decodes": decodes,
    }
    print(json.dumps(result))


def checkpoints(folder: Path, kinds: list[str], layers: int) -> dict[str, Path]:
    """The folders of the checkpoints, by kind; made if they are missing."""
    found = {"bf16": folder / "bf16"}
    if not found["bf16"].exists():
        models.llama(
            found["bf16"], dtype=torch.bfloat16, num_hidden_layers=layers, **CONFIG
        )
    for kind in kinds:
        found[kind] = folder / kind
        if not found[kind].exists():
            to, options = kind.partition("-")[0], GROUPS.get(kind, [])
            models.converted(found["bf16"], found[kind], to, *options)
    return found


def measured(
    folders: dict[str, Path],
    args: argparse.Namespace,
    shape: tuple[int, int],
    work: str,
    link: str | None,
) -> list[Pass]:
    """Passes of all kinds, in turns."""
    ids = torch.arange(shape[0] * shape[1]).view(shape) % 2000
    passes = []
    with ExitStack() as stack:
        opened = {}
        for kind, path in folders.items():
            policy = Policy(
                dtype="float32",
                device_memory="1200MiB",
                links={"disk": {"bandwidth": link}} if link else {},
            )
            opened[kind] = stack.enter_context(penstock.load(path, policy))
        with torch.inference_mode():
            for model in opened.values():
                model(ids)  # the working set is touched, files are found
            for number in frame.progress(range(args.rounds), work):
                for kind, model in opened.items():
                    passes.append(steady_pass(kind, model, ids, work, number))
    return passes


def steady_pass(
    kind: str, model: Any, ids: torch.Tensor, work: str, number: int
) -> Pass:
    """The mean of `_LAPS` passes after one that is not counted: that one finds the
    blocks in place which were read since the model's turn before."""
    model(ids)
    before, timeline = penstock.statistics(model), engine_of(model).timeline
    cpu, start = time.process_time(), time.perf_counter()
    for _ in range(_LAPS):
        model(ids)
    seconds = (time.perf_counter() - start) / _LAPS
    cpu = (time.process_time() - cpu) / _LAPS
    after = penstock.statistics(model)
    spans = [s for s in timeline.spans() if s.lane == CASTING]
    decoding = sum(
        s.end_seconds - s.start_seconds for s in spans if s.start_seconds >= start
    )
    read = (after.bytes_read["disk"] - before.bytes_read["disk"]) / _LAPS
    speed = ids.numel() / seconds
    return Pass(kind, work, number, seconds, cpu, decoding / _LAPS, read, speed)


def table(passes: list[Pass], args: argparse.Namespace) -> str:
    lines = [
        f"| over bf16's, medians of {args.rounds} | bytes read | CPU | decode | "
        "tokens/s | of the ceiling |",
        "|---|---|---|---|---|---|",
    ]
    works = dict.fromkeys(one.work for one in passes)
    for work in works:
        usual = of(passes, work, "bf16")
        for kind in dict.fromkeys(one.kind for one in passes):
            mine = of(passes, work, kind)
            share = {
                name: statistics.median(
                    getattr(a, name) / max(getattr(b, name), 1e-9)
                    for a, b in zip(mine, usual, strict=True)
                )
                for name in (
                    "read_bytes",
                    "cpu_seconds",
                    "decode_seconds",
                    "tokens_per_second",
                )
            }
            ceiling = share["tokens_per_second"] * share["read_bytes"]
            lines.append(
                f"| {kind}, {work} | {share['read_bytes']:.3f} | "
                f"{share['cpu_seconds']:.2f} | {share['decode_seconds']:.2f} | "
                f"{share['tokens_per_second']:.2f} | "
                + (f"{ceiling:.0%} |" if work == "few sequences" else "|")
            )
    return "\n".join(lines)


def of(passes: list[Pass], work: str, kind: str) -> list[Pass]:
    return [one for one in passes if (one.work, one.kind) == (work, kind)]


def parse_args() -> argparse.Namespace:
    parser = frame.parser(__doc__)
    parser.add_argument(
        "--kinds", nargs="+", default=["fp8", "int8", "int4", "int4-g32", "lossless"]
    )
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--link", default="500MB", help="bytes a second of the drive")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--work", type=Path, help="keeps the checkpoints there")
    return parser.parse_args()


if __name__ == "__main__":
    main()

"""Runs workers in processes of their own, in turns, so that what is compared is
interleaved; and the options that the scripts which do that share."""

import argparse
import json
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from common import frame, limits, machine
from common.beside import Beside
from penstock.offload.settings.values import parse_bytes


def add_options(parser: argparse.ArgumentParser, *, dtype: str, rounds: int) -> None:
    """Adds the options of a checkpoint that is compared in turns, with defaults."""
    model = frame.BENCH / "out" / "llama-3b"
    parser.add_argument("--model", type=Path, default=model)
    parser.add_argument("--size", default="3b", help="made if --model is absent")
    parser.add_argument("--dtype", default=dtype, choices=("bfloat16", "float32"))
    parser.add_argument("--device-memory", default="1GiB")
    parser.add_argument("--memory-limit", help="of each process, such as 3GiB")
    parser.add_argument("--rounds", type=int, default=rounds)


def prepare(args: argparse.Namespace) -> tuple[int, int | None, dict[str, Any]]:
    """Makes the checkpoint if there is none, and prints the computer's facts.

    Returns the size of the vocabulary, the bytes that each process is limited to, and
    those facts.
    """
    frame.checkpoint(args.model, args.size)
    config = json.loads((args.model / "config.json").read_text())
    limit = parse_bytes(args.memory_limit) if args.memory_limit else None
    facts = frame.card(args.model)
    if limit is not None and not limits.is_allowed():
        print("NO memory limit: this machine allows no cgroup of ours")
    return config["vocab_size"], limit, facts


def run(
    command: list[str],
    model: Path,
    limit_bytes: int | None,
    beside: Beside[Any] | None = None,
) -> dict[str, Any]:
    """Runs `command` on a checkpoint that is in no cache. Returns the JSON object in
    the last line of its output."""
    machine.evict(model)
    with (
        limits.memory_limit(limit_bytes) as join,
        subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            preexec_fn=join,
        ) as process,
    ):
        communicate = process.communicate
        out, err = communicate() if beside is None else beside.communicate(process)
    try:
        found = json.loads(out.strip().splitlines()[-1])
        assert isinstance(found, dict), "a worker prints an object"
    except (IndexError, ValueError, AssertionError):
        tail = err.strip().splitlines()[-3:]
        return {"error": f"exit {process.returncode}: {' | '.join(tail)}"}
    if beside is not None:
        beside.correct(found)
    return found


def in_turns(
    contenders: dict[str, list[str]],
    model: Path,
    limits_of: dict[str, int | None],
    rounds: int,
    *,
    rate: str,
    beside: Mapping[str, Beside[Any]] | None = None,
) -> dict[str, list[dict[str, Any]]]:
    """Runs all `contenders` in each of `rounds`, and prints the `rate` of each."""
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in contenders}
    for number in range(rounds):
        for name, command in contenders.items():
            watch = None if beside is None else beside[name]
            found = run(command, model, limits_of[name], watch)
            runs[name].append(found)
            speed, cpu = found.get(rate, found.get("error")), found.get("cpu_seconds")
            print(f"round {number}: {name}: {speed} CPU s: {cpu}", flush=True)
    return runs

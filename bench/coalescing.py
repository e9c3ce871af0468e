"""Compares ways to decode sixteen groups of four sequences of different lengths: in a
sweep with coalesced matrix products, in one without and, with equal lengths, as one
batch of 64.

The ceiling is the time of the matrix products at 64 rows: each `nn.Linear` of the model
is measured in the same round. The single batch has no padding and runs Python code once
for all, so a sweep can come close to it but not reach it. All weights stay in the
working set, so only computing is compared. Times begin when every group has its first
token. Cases take turns, and medians are shown, with the numbers of calls and rows of
matrix products.

    python bench/coalescing.py [--layers 8] [--hidden 2048] [--tokens 9] [--rounds 3]

The last line of the output is one JSON object.

Takes about three minutes; needs 2 GB of disk in this folder and 5 GB of memory.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import LogitsProcessor, LogitsProcessorList

import penstock
from common import frame, machine, models
from penstock import Policy

VOCABULARY = 4096
TOKENS: dict[str, Any] = {"bos_token_id": 1, "pad_token_id": 0, "eos_token_id": None}
CASES = ("wide", "apart", "coalesced")


@dataclass(frozen=True)
class Run:
    """One case in one round."""

    case: str
    first_seconds: float
    """Seconds until every group has its first token."""
    seconds: float
    """Seconds from then to the end."""
    cpu_seconds: float
    """CPU seconds of the whole run, which vary less when others use the machine."""
    tokens_per_second: float
    joint_calls: int
    rows_per_joint_call: float


class FirstToken(LogitsProcessor):
    """Records when its group gets its first token."""

    def __init__(self) -> None:
        self.at: float | None = None

    def __call__(
        self, input_ids: torch.LongTensor, scores: torch.FloatTensor
    ) -> torch.FloatTensor:
        if self.at is None:
            self.at = time.perf_counter()
        return scores


def groups(case: str, num: int, rows: int, width: int) -> list[torch.Tensor]:
    """Prompts: `num` groups with lengths around `width`, or one group with that length,
    each int64 [rows, length]."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(rows, width // 2 + index * width // num) for index in range(num)]
    if case == "wide":
        shapes = [(num * rows, width)]
    return [torch.randint(5, VOCABULARY, s, generator=generator) for s in shapes]


def decode(
    model: Any, case: str, args: argparse.Namespace
) -> tuple[Run, list[torch.Tensor]]:
    def generate(ids: torch.Tensor) -> tuple[float, torch.Tensor]:
        first = FirstToken()
        found = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=args.tokens,
            do_sample=False,
            logits_processor=LogitsProcessorList([first]),
        )
        assert first.at is not None
        return first.at, found[:, ids.shape[1] :]

    prompts = groups(case, args.groups, args.rows, args.width)
    before = penstock.statistics(model)
    start, used = time.perf_counter(), time.process_time()
    coalesce = case == "coalesced"
    with penstock.sweep(model, width=len(prompts), coalesce=coalesce) as sweep:
        found = sweep.map(generate, prompts)
    end, used = time.perf_counter(), time.process_time() - used
    after = penstock.statistics(model)
    began = max(at for at, _ in found)
    num_calls = after.num_joint_calls - before.num_joint_calls
    num_rows = after.num_joint_rows - before.num_joint_rows
    num_tokens = args.groups * args.rows * (args.tokens - 1)
    run = Run(
        case,
        began - start,
        end - began,
        used,
        num_tokens / (end - began),
        num_calls,
        num_rows / max(1, num_calls),
    )
    return run, [tokens for _, tokens in found]


class Products:
    """The matrix products of one decoding step, without anything else: those of one
    block, repeated for all blocks, and that of the head."""

    def __init__(self, args: argparse.Namespace) -> None:
        self._num_blocks = args.layers
        hidden, inner = args.hidden, args.hidden * 11 // 4
        shapes = [(hidden, hidden)] * 4 + [(inner, hidden)] * 2 + [(hidden, inner)]
        self._block = [torch.randn(shape) for shape in shapes]
        self._head = torch.randn(VOCABULARY, hidden)
        self._inputs = {
            n: torch.randn(args.groups * args.rows, n) for n in set(shapes[-1])
        }

    def seconds(self) -> float:
        start = time.perf_counter()
        for weight in [*self._block * self._num_blocks, self._head]:
            nn.functional.linear(self._inputs[weight.shape[1]], weight)
        return time.perf_counter() - start


def measure(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    nbytes = sum(p.stat().st_size for p in folder.glob("*.safetensors"))
    num = args.groups * args.rows
    runs: list[Run] = []
    ceilings: list[float] = []
    with penstock.load(folder, Policy(device_memory=nbytes + (64 << 20))) as model:
        products = Products(args)
        products.seconds()
        for number in range(args.rounds):
            ceilings.append(num / products.seconds())
            print(f"round {number}: at best {ceilings[-1]:.0f} tokens/s", flush=True)
            turn = number % len(CASES)  # the order must not matter
            tokens: dict[str, list[torch.Tensor]] = {}
            for case in CASES[turn:] + CASES[:turn]:
                one, tokens[case] = decode(model, case, args)
                runs.append(one)
                print(
                    f"  {case:10} {one.tokens_per_second:7.1f} tokens/s "
                    f"({one.seconds:.2f} s after {one.first_seconds:.2f} s, "
                    f"CPU {one.cpu_seconds:.2f} s), "
                    f"{one.joint_calls} joint calls of {one.rows_per_joint_call:.0f} "
                    "rows",
                    flush=True,
                )
            pairs = zip(tokens["apart"], tokens["coalesced"], strict=True)
            assert all(torch.equal(a, b) for a, b in pairs), "tokens differ"
    rates = {
        case: statistics.median(r.tokens_per_second for r in runs if r.case == case)
        for case in CASES
    }
    return {
        "ceiling_tokens_per_second": statistics.median(ceilings),
        "tokens_per_second": rates,
        "coalesced_over_apart": _ratio(runs, "coalesced", "apart"),
        "coalesced_over_wide": _ratio(runs, "coalesced", "wide"),
        "runs": [asdict(one) for one in runs],
    }


def _ratio(runs: list[Run], one: str, other: str) -> float:
    """The median over the rounds of the ratio of `one` to `other`."""
    rates = {
        case: [run.tokens_per_second for run in runs if run.case == case]
        for case in (one, other)
    }
    pairs = zip(rates[one], rates[other], strict=True)
    return statistics.median(a / b for a, b in pairs)


def parse_args() -> argparse.Namespace:
    parser = frame.parser(__doc__)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--groups", type=int, default=16)
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--width", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=9)
    parser.add_argument("--rounds", type=int, default=3)
    return parser.parse_args()


def main() -> int:
    args = parse_args()
    with frame.scratch(parent=frame.BENCH) as folder:
        models.square(folder, args.layers, args.hidden, vocab_size=VOCABULARY, **TOKENS)
        facts = machine.card(folder)
        found = measure(args, folder)
    best = found["ceiling_tokens_per_second"]
    for case, rate in found["tokens_per_second"].items():
        print(f"{case:10} {rate:7.1f} tokens/s, {rate / best:.2f} of the ceiling")
    print(f"coalesced over apart: {found['coalesced_over_apart']:.2f}")
    print(f"coalesced over wide:  {found['coalesced_over_wide']:.2f}")
    return frame.finish({"machine": facts, "settings": frame.settings(args), **found})


if __name__ == "__main__":
    sys.exit(main())

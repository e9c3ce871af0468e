"""Streams half of the blocks over a link with a limited speed; the other half stays on
the device.

The ceiling of a pass is `max(t_c, f W / B)`: `t_c` is the time of a pass if everything
stays on the device (measured in the same round), `W` the bytes of all blocks, `f` the
share of them that comes over the link (about a half, counted), `B` the speed of the
link. Shown are B = 4 W/t_c, with which the link is idle most of the time, 1 W/t_c, and
1/4 W/t_c, with which it binds. All cases take turns. Medians of the shares of the
ceiling are shown, with counts of the bytes that came over the link, and with the
simulator's prediction from t_c for the same placement, slots and links.

    python bench/links.py [--tier host|peer|disk] [--rounds 3]

The last line of the output is one JSON object.

Takes about five minutes; needs 0.4 GB of disk in this folder and 2 GB of memory.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

import penstock
from common import frame, machine, models
from penstock import Policy
from penstock.offload.engine.engine import Engine
from penstock.offload.model import engine_of
from penstock.scheduler.simulation.simulate import simulate
from penstock.scheduler.simulation.simulated import Rank, SimulatedLink

VOCABULARY = 2048
FACTORS = (4.0, 1.0, 0.25)
ODD = r"^model\.layers\.\d*[13579]$"
EVEN = r"^model\.layers\.\d*[02468]$"


@dataclass(frozen=True)
class Run:
    """One case in one round."""

    factor: float | None
    """The speed of the link in units of W/t_c; None: everything stays on the device."""
    seconds: float
    cpu_seconds: float
    link_bytes: float
    wait_seconds: float
    """Seconds; this and the other times are of one pass."""
    predicted_seconds: float | None = None
    """The simulator's prediction from t_c; None if nothing comes over the link."""
    predicted_from_own_seconds: float | None = None
    """The prediction from the compute time of this run. On a shared computer it may
    differ from t_c, which was measured earlier."""


def policy_of(
    tier: str, bytes_per_second: float | None, model_bytes: int, layers: int
) -> Policy:
    """A policy with all blocks on the device; or with every second block in `tier`,
    over a link with that speed, and room for three of them on the device."""
    values: dict[str, Any] = {"device_memory": model_bytes + (16 << 20)}
    if bytes_per_second is not None:
        away = layers // 2 - 3
        values["device_memory"] -= model_bytes * away // layers
        values["placement"] = {ODD: tier, EVEN: "device"}
        values["links"] = {tier: {"bandwidth": round(bytes_per_second)}}
        if tier == "host":
            values["host_memory"] = model_bytes
        if tier == "peer":
            values["peer"] = {"cpu": model_bytes}
    return Policy(**values)


def run(
    folder: Path,
    policy: Policy,
    batches: list[torch.Tensor],
    passes: int,
    sleep_seconds: float,
) -> tuple[float, float, float, float, torch.Tensor]:
    """(seconds, CPU seconds, link bytes, seconds waited, logits); all but the logits
    are of one pass."""
    with penstock.load(folder, policy) as model:
        if sleep_seconds:
            for block in model.model.layers:
                block.register_forward_pre_hook(lambda *_: time.sleep(sleep_seconds))

        def score(ids: torch.Tensor, times: int) -> torch.Tensor:
            for _ in range(times):
                logits = model(ids, use_cache=False, logits_to_keep=1).logits
            assert isinstance(logits, torch.Tensor)
            return logits

        with penstock.sweep(model, width=len(batches)) as sweep:
            sweep.map(lambda ids: score(ids, 1), batches)  # loads what stays
            before, moved = penstock.statistics(model), _link_bytes(model)
            start, used = time.perf_counter(), time.process_time()
            found = sweep.map(lambda ids: score(ids, passes), batches)
            seconds = time.perf_counter() - start
            cpu_seconds = time.process_time() - used
            after = penstock.statistics(model)
        waited = after.wait_seconds - before.wait_seconds
        return (
            seconds / passes,
            cpu_seconds / passes,
            (_link_bytes(model) - moved) / passes,
            waited / passes,
            torch.cat(found),
        )


def _link_bytes(model: Any) -> int:
    return sum(link.statistics().bytes_moved for link in engine_of(model)._tiers.links)


def predict(engine: Engine, t_c: float, num_micro_batches: int, passes: int) -> float:
    """Predicted seconds of a pass of `engine`, if all its blocks together compute for
    `t_c` seconds."""
    tiers, found = engine._tiers, engine.model_division
    sites = [engine._binding.units_of_site(site) for site in range(len(found.sites))]
    units = [unit for (unit,) in sites if not found.units[unit].is_resident]
    blocks = [".layers." in found.units[unit].name for unit in units]
    always = sum(
        plan.nbytes
        for unit, plan in zip(found.units, tiers._layouts, strict=True)
        if unit.is_resident
    )
    names = {"cpu": "peer"}  # the CPU simulates the peer
    links: dict[str, SimulatedLink] = {
        tier: SimulatedLink(bytes_per_second=link.bandwidth)
        for tier, link in engine.policy.links.items()
    }
    rank = Rank(
        sizes=[tiers._transfers[unit].nbytes for unit in units],
        tiers=[names.get(tiers.placement[u], tiers.placement[u]) for u in units],
        routes={tier: [tier] for tier in links},
        capacity=engine.statistics().device_memory_bytes - always,
        compute_seconds=np.array(blocks)[:, None]
        * t_c
        / sum(blocks)
        / num_micro_batches,
        lookahead=engine.policy.lookahead,
    )
    expected = simulate(
        [rank],
        links,
        num_micro_batches=num_micro_batches,
        num_passes=passes,
        passes_before=1,
    )
    return expected.steady_pass_seconds


def ceiling(t_c: float, link_bytes: float, bytes_per_second: float) -> float:
    """Seconds of a pass without any waste."""
    return max(t_c, link_bytes / bytes_per_second)


def measure(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    shape = (args.micro_batches, args.rows, args.width)
    batches = list(torch.randint(5, VOCABULARY, shape, generator=generator))
    model_bytes = sum(p.stat().st_size for p in folder.glob("*.safetensors"))
    everything = policy_of(args.tier, None, model_bytes, args.layers)
    t_first, *_, expected = run(folder, everything, batches, args.passes, args.sleep)
    with penstock.load(folder, everything) as model:
        units = engine_of(model).model_division.units
        blocks = [unit for unit in units if ".layers." in unit.name]
        recipes = engine_of(model).recipes
        block_bytes = sum(recipes[name].nbytes for u in blocks for name in u.tensors)
    speeds = {factor: factor * block_bytes / t_first for factor in args.factors}
    runs: list[Run] = []
    shares: dict[float, list[float]] = {factor: [] for factor in args.factors}
    of_predicted: dict[float, list[float]] = {factor: [] for factor in args.factors}
    of_own: dict[float, list[float]] = {factor: [] for factor in args.factors}
    for number in range(args.rounds):
        cases: list[float | None] = [None, *args.factors]
        turn = number % len(cases)  # the order must not matter
        these: dict[float | None, Run] = {}
        for factor in cases[turn:] + cases[:turn]:
            held_to = None if factor is None else speeds[factor]
            policy = policy_of(args.tier, held_to, model_bytes, args.layers)
            *figures, logits = run(folder, policy, batches, args.passes, args.sleep)
            assert torch.equal(logits, expected), "the link changed the logits"
            these[factor] = Run(factor, *figures)
        t_c = these[None].seconds
        for factor in args.factors:
            policy = policy_of(args.tier, speeds[factor], model_bytes, args.layers)
            with penstock.load(folder, policy) as model:
                own = these[factor].seconds - these[factor].wait_seconds
                expected_seconds, from_own = (
                    predict(engine_of(model), busy, args.micro_batches, args.passes)
                    for busy in (t_c, own)
                )
            these[factor] = replace(
                these[factor],
                predicted_seconds=expected_seconds,
                predicted_from_own_seconds=from_own,
            )
            of_predicted[factor].append(these[factor].seconds / expected_seconds)
            of_own[factor].append(these[factor].seconds / from_own)
        runs += these.values()
        print(f"round {number}: all on the device: {t_c:.2f} s a pass", flush=True)
        for factor, speed in speeds.items():
            seconds, moved = these[factor].seconds, these[factor].link_bytes
            best = ceiling(t_c, moved, speed)
            one = these[factor]
            shares[factor].append(seconds / best)
            print(
                f"  B = {factor:g} W/t_c = {speed / 1e6:.0f} MB/s: {seconds:.2f} s, "
                f"of at best {best:.2f}: {seconds / best:.3f}; predicted "
                f"{one.predicted_seconds:.2f}: {of_predicted[factor][-1]:.3f} "
                f"(from its own computing: {of_own[factor][-1]:.3f}); "
                f"{moved / 1e6:.0f} MB over the link, waited {one.wait_seconds:.2f} "
                f"s, CPU {one.cpu_seconds:.2f} s of {these[None].cpu_seconds:.2f}",
                flush=True,
            )
    return {
        "block_bytes": block_bytes,
        "seconds_over_ceiling": {f: statistics.median(s) for f, s in shares.items()},
        "spread": {f: [min(s), max(s)] for f, s in shares.items()},
        "seconds_over_predicted": {
            f: statistics.median(s) for f, s in of_predicted.items()
        },
        "seconds_over_predicted_from_own": {
            f: statistics.median(s) for f, s in of_own.items()
        },
        "runs": [asdict(one) for one in runs],
    }


def parse_args() -> argparse.Namespace:
    parser = frame.parser(__doc__)
    parser.add_argument("--tier", choices=("host", "peer", "disk"), default="host")
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--hidden", type=int, default=768)
    parser.add_argument("--micro-batches", type=int, default=4)
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--passes", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--sleep",
        type=float,
        default=0.0,
        help="seconds that each block sleeps for each micro-batch: with a small model "
        "that is all its computing, as long whoever else uses the processor",
    )
    parser.add_argument("--factors", type=float, nargs="+", default=list(FACTORS))
    return parser.parse_args()


def main() -> int:
    args = parse_args()
    with frame.scratch(parent=frame.BENCH) as folder:
        models.square(folder, args.layers, args.hidden, vocab_size=VOCABULARY)
        facts = machine.card(folder)
        found = measure(args, folder)
    for factor, share in found["seconds_over_ceiling"].items():
        low, high = found["spread"][factor]
        print(
            f"B = {factor:g} W/t_c: {share:.3f} of the ceiling ({low:.3f}-{high:.3f}), "
            f"{found['seconds_over_predicted'][factor]:.3f} of what was predicted, "
            f"{found['seconds_over_predicted_from_own'][factor]:.3f} from its own "
            "computing"
        )
    return frame.finish({"machine": facts, "settings": frame.settings(args), **found})


if __name__ == "__main__":
    sys.exit(main())

"""Measures how long simulations take, and shows their results.

    python bench/simulation.py [--units 126] [--micro-batches 1024] [--passes 64]

Half of the units stay on the device; the others come over a link with half the speed
that would keep up with computing. The last line of the output is one JSON object.

Takes about half a minute; needs no files and no torch device.
"""

from __future__ import annotations

import argparse
import sys
import time
from typing import Any

import numpy as np

from common import frame, machine
from penstock.scheduler.simulation.simulate import simulate
from penstock.scheduler.simulation.simulated import Rank, SimulatedLink, Traffic

UNIT_BYTES = 1 << 30
SECONDS = 1e-3
"""Seconds of a micro-batch in a unit."""


def rank(units: int, route: list[str], **values: Any) -> Rank:
    """A rank in which every second unit stays, with three slots for the others."""
    tiers = ["host" if unit % 2 else "device" for unit in range(units)]
    settings: dict[str, Any] = {
        "sizes": [UNIT_BYTES] * units,
        "tiers": tiers,
        "routes": {"host": route},
        "capacity": (tiers.count("device") + 3) * UNIT_BYTES,
        "compute_seconds": SECONDS,
    }
    return Rank(**{**settings, **values})


def cases(args: argparse.Namespace) -> dict[str, tuple[list[Rank], Any, int, int]]:
    """(ranks, links, micro-batches, passes) of each case, by name."""
    visit = args.micro_batches * SECONDS
    link = SimulatedLink(bytes_per_second=UNIT_BYTES / visit / 4)
    fast = SimulatedLink(bytes_per_second=100 * UNIT_BYTES / visit)
    random = np.random.default_rng(0)
    shape = (args.passes, args.units, args.micro_batches)
    kv = Traffic(
        link_in="in",
        link_out="out",
        bytes_in=random.integers(0, 2 * UNIT_BYTES // args.micro_batches, shape[1:]),
        bytes_out=1 << 10,
    )
    one = {"link": link, "in": fast, "out": fast}
    ways = {f"link{number}": fast for number in range(args.devices)}
    drive = SimulatedLink(bytes_per_second=link.bytes_per_second * args.devices)
    many = [rank(args.units, ["drive", name], runs_ahead=True) for name in ways]
    few = max(2, args.passes // 16)
    big = args.units * 8
    return {
        "one device": ([rank(args.units, ["link"])], one, args.micro_batches, shape[0]),
        "keys and values that differ": (
            [rank(args.units, ["link"], kv=kv)],
            one,
            args.micro_batches,
            shape[0],
        ),
        f"{args.devices} devices, one drive": (
            many,
            {"drive": drive, **ways},
            args.micro_batches,
            few,
        ),
        f"{big} units": ([rank(big, ["link"])], one, args.micro_batches, 2),
    }


def main() -> int:
    parser = frame.parser(__doc__)
    parser.add_argument("--units", type=int, default=126)
    parser.add_argument("--micro-batches", type=int, default=1024)
    parser.add_argument("--passes", type=int, default=64)
    parser.add_argument("--devices", type=int, default=256)
    args = parser.parse_args()
    results = []
    for name, (ranks, links, micro_batches, passes) in cases(args).items():
        start = time.perf_counter()
        found = simulate(
            ranks, links, num_micro_batches=micro_batches, num_passes=passes
        )
        seconds = time.perf_counter() - start
        units = len(ranks[0].sizes)
        print(
            f"{name}: {units} units x {micro_batches} micro-batches x {passes} passes: "
            f"{seconds:.2f} s, {found.num_events:,} events; a pass takes "
            f"{found.steady_pass_seconds:,.1f} s",
            flush=True,
        )
        results.append(
            {
                "case": name,
                "units": units,
                "micro_batches": micro_batches,
                "passes": passes,
                "devices": len(ranks),
                "seconds": seconds,
                "events": found.num_events,
                "pass_seconds": found.steady_pass_seconds,
            }
        )
    facts = machine.card(frame.BENCH)
    return frame.finish({"machine": facts, "results": results})


if __name__ == "__main__":
    sys.exit(main())

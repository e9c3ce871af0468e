"""Compares matrix products with aligned and unaligned weights, and measures the cost of
moving weights to align them.

A weight begins at a multiple of 64 bytes, as torch's allocator places it, or 8 or 32
bytes further, as tensors do in a mapped file. Products are compute-bound (many rows) or
bandwidth-bound (one row). They are interleaved; the ratio of medians counts. In
addition, the rate at which the bytes of a slot are moved within it is measured. The
loader does that if a drive does not read to any address.

Takes about a minute; needs nothing but a quiet machine.
"""

import ctypes
import json
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median

import torch

from common import frame, machine
from penstock.io.weights.residue import clone_at

RESIDUES = (0, 8, 32)


def seconds(act: Callable[[], object]) -> float:
    start = time.perf_counter()
    act()
    return time.perf_counter() - start


def product_ratios(
    dtype: torch.dtype, rows: int, size: int, rounds: int
) -> tuple[dict[int, float], bool]:
    """The seconds at each residue divided by those at residue 0, and whether all
    results were equal bit for bit."""
    weight = torch.randn(size, size).to(dtype)
    weights = {residue: clone_at(weight, residue) for residue in RESIDUES}
    x = torch.randn(rows, size).to(dtype)
    results = {r: torch.nn.functional.linear(x, w) for r, w in weights.items()}
    found: dict[int, list[float]] = defaultdict(list)
    for round_ in range(rounds):
        order = RESIDUES if round_ % 2 else RESIDUES[::-1]
        for residue in order:
            act = partial(torch.nn.functional.linear, x, weights[residue])
            found[residue].append(seconds(act))
    medians = {residue: median(found[residue]) for residue in RESIDUES}
    is_equal = all(torch.equal(results[0], result) for result in results.values())
    return {r: medians[r] / medians[0] for r in RESIDUES}, is_equal


def move_bytes_per_second(nbytes: int, rounds: int) -> float:
    tensor = torch.zeros(nbytes + 64, dtype=torch.uint8)  # holds the memory
    memory = tensor.data_ptr()
    times = [
        seconds(lambda: ctypes.memmove(memory, memory + 8, nbytes))
        for _ in range(rounds)
    ]
    return nbytes / median(times)


def main() -> int:
    parser = frame.parser(__doc__)
    parser.add_argument("--size", type=int, default=2048, help="rows of the weight")
    parser.add_argument("--rounds", type=int, default=21)
    args = parser.parse_args()
    facts = machine.card(Path.cwd())
    print(json.dumps(facts))
    report = []
    with torch.inference_mode():
        for dtype in (torch.float32, torch.bfloat16):
            for rows in (1, 8, 64, 512):
                ratios, is_equal = product_ratios(dtype, rows, args.size, args.rounds)
                bits = "the same bits" if is_equal else "OTHER BITS"
                shown = ", ".join(f"+{r}: {ratios[r]:.3f}" for r in RESIDUES[1:])
                print(f"{dtype}, {rows} rows: time beside aligned {shown}; {bits}")
                report.append(
                    {
                        "dtype": str(dtype),
                        "rows": rows,
                        "time_ratio_by_residue": ratios,
                        "is_bit_equal": is_equal,
                    }
                )
    rate = move_bytes_per_second(64 << 20, args.rounds)
    print(f"moved within a slot, one thread: {rate / 1e9:.1f} GB/s")
    return frame.finish(
        {"machine": facts, "products": report, "move_bytes_per_sec": rate}
    )


if __name__ == "__main__":
    sys.exit(main())

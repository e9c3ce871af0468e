"""Times the loops that decode weights beside the cast of as many bfloat16 numbers."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

from penstock.io.codecs.codec import Codec
from penstock.io.codecs.codes import Codes
from penstock.io.codecs.kernels import ScaleBlocks
from penstock.io.codecs.lossless import Lossless
from penstock.io.codecs.opening import open_kernels
from penstock.io.codecs.packed import pack
from penstock.io.codecs.scaled import Scaled
from penstock.io.fallbacks import Fallbacks

SIZE = 3072
"""Rows and columns of a weight."""
_NUM_BUFFERS = 6
"""Sources and targets that take turns, so that none stays in the caches."""
BF16, FP32 = torch.bfloat16, torch.float32
_FP4 = Codes.FLOAT4_E2M1
CASES: dict[str, tuple[Codes, ScaleBlocks, torch.dtype, bool]] = {
    "fp8 to float32": (Codes.FLOAT8_E4M3, ScaleBlocks(128, 128), FP32, False),
    "fp8 to bfloat16": (Codes.FLOAT8_E4M3, ScaleBlocks(128, 128), BF16, False),
    "int8 to float32": (Codes.INT8, ScaleBlocks(1, SIZE), FP32, False),
    "int8 to bfloat16": (Codes.INT8, ScaleBlocks(1, SIZE), BF16, False),
    "int4, groups of 128, to float32": (Codes.INT4, ScaleBlocks(1, 128), FP32, False),
    "int4, groups of 128, to bfloat16": (Codes.INT4, ScaleBlocks(1, 128), BF16, False),
    "int4, groups of 32, to float32": (Codes.INT4, ScaleBlocks(1, 32), FP32, False),
    "mxfp4, transposed, to float32": (_FP4, ScaleBlocks(1, 32), FP32, True),
    "mxfp4, transposed, to bfloat16": (_FP4, ScaleBlocks(1, 32), BF16, True),
}
"""Codes, their blocks, the dtype that is made, and whether rows become columns."""


def over_casting(cache: Path, rounds: int = 25) -> dict[str, float]:
    """Seconds of each decode over those of the cast, both of one thread, in turns:
    medians. `cache` is the folder of compiled kernels."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return _over_casting(cache, rounds)
    finally:
        torch.set_num_threads(threads)


def _over_casting(cache: Path, rounds: int) -> dict[str, float]:
    kernels = open_kernels(cache, Fallbacks(), "weights")
    targets = [torch.zeros(SIZE * SIZE) for _ in range(_NUM_BUFFERS)]
    original = [torch.randn(SIZE, SIZE).to(BF16) for _ in range(_NUM_BUFFERS)]

    def cast(number: int) -> None:
        targets[number].view(SIZE, SIZE).copy_(original[number])

    def decode(
        codec: Codec,
        stored: list[list[torch.Tensor]],
        dtype: torch.dtype,
        is_turned: bool,
        number: int,
    ) -> None:
        target = targets[number].view(dtype)[: SIZE * SIZE].view(SIZE, SIZE)
        if is_turned:
            target = target.t()
        codec.decode(stored[number], target, kernels)

    works: dict[str, Callable[[int], None]] = {"cast": cast}
    for name, (codes, blocks, dtype, is_turned) in CASES.items():
        stored = [
            [
                torch.randint(0, 120, (SIZE, SIZE // codes.per_byte)).to(torch.uint8),
                torch.rand(blocks.grid((SIZE, SIZE))),
            ]
            for _ in range(_NUM_BUFFERS)
        ]
        works[name] = partial(decode, Scaled(codes, blocks), stored, dtype, is_turned)
    for dtype in (FP32, BF16):
        packed = [[pack(one)[0]] for one in original]
        works[f"lossless to {str(dtype).removeprefix('torch.')}"] = partial(
            decode, Lossless(SIZE, has_escapes=False), packed, dtype, False
        )
    seconds: dict[str, list[float]] = {name: [] for name in works}
    for number in range(rounds):
        for name, work in works.items():
            start = time.perf_counter()
            work(number % _NUM_BUFFERS)
            seconds[name].append(time.perf_counter() - start)
    medians = {name: statistics.median(taken) for name, taken in seconds.items()}
    return {name: taken / medians["cast"] for name, taken in medians.items()}

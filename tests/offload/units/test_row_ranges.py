"""Ranges of rows of quantised stacks: the bytes of these rows, and no others."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from penstock.io.checkpoint.header import TensorEntry
from penstock.io.codecs.codes import Codes
from penstock.io.codecs.kernels import ScaleBlocks
from penstock.io.codecs.scaled import Divisor, Scaled
from penstock.io.weights.recipe import TensorSlice, View
from penstock.offload.units.expert_cuts import row_range

FILE = Path("model.safetensors")
ROWS, COLUMNS = 64, 32


def entry(
    name: str, dtype: torch.dtype, shape: tuple[int, ...], at: int
) -> TensorEntry:
    nbytes = torch.Size(shape).numel() * dtype.itemsize
    return TensorEntry(name, dtype, shape, FILE, at, nbytes)


def part_of(codes: Codes, blocks: ScaleBlocks, has_divisor: bool) -> TensorSlice:
    """Four weights of 16 rows, as the rows of one."""
    shape = (ROWS, COLUMNS // codes.per_byte)
    weight = entry("weight", torch.uint8, shape, 8)
    scales = entry("scales", torch.float32, blocks.grid((ROWS, COLUMNS)), 10_000)
    divisor = entry("divisor", torch.float32, (1,), 20_000)
    way = Divisor.STORED if has_divisor else Divisor.NONE
    return TensorSlice(
        weight,
        View.whole(shape),
        View.whole((ROWS, COLUMNS)),
        Scaled(codes, blocks, divisor=way),
        (scales, divisor) if has_divisor else (scales,),
    )


@pytest.mark.parametrize("codes", [Codes.FLOAT8_E4M3, Codes.FLOAT4_E2M1])
@pytest.mark.parametrize("blocks", [ScaleBlocks(8, 16), ScaleBlocks(1, 8)])
@pytest.mark.parametrize("has_divisor", [False, True])
def test_a_range_has_its_share_of_every_stored_tensor(
    codes: Codes, blocks: ScaleBlocks, has_divisor: bool
) -> None:
    whole = part_of(codes, blocks, has_divisor)
    parts = [row_range(whole, start, 16) for start in range(0, ROWS, 16)]
    last = parts[3]
    assert last is not None
    assert (last.target.offset, last.target.shape) == (48 * COLUMNS, (16, COLUMNS))
    assert last.entry.extent.end == whole.entry.extent.end
    assert last.companions[0].extent.end == whole.companions[0].extent.end
    assert last.companions[1:] == whole.companions[1:]
    shared = 3 * 4 * has_divisor
    nbytes = sum(part.stored_bytes for part in parts if part is not None)
    assert nbytes == whole.stored_bytes + shared


def test_rows_that_are_decoded_together_are_not_cut() -> None:
    whole = part_of(Codes.FLOAT8_E4M3, ScaleBlocks(32, 16), False)
    assert row_range(whole, 0, 32) is not None
    assert row_range(whole, 0, 16) is None


def test_rows_that_share_all_scales_keep_them() -> None:
    whole = part_of(Codes.FLOAT8_E4M3, ScaleBlocks(0, 16), False)
    found = row_range(whole, 16, 16)
    assert found is not None
    assert found.companions == whole.companions

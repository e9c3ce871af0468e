"""Codecs of quantised weights make the same bits as one plain formula, in any parts."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from test_codecs import decoded_in_parts

from checkpoints import random_floats, random_tensor, same_bits
from penstock.io.codecs.codes import Codes
from penstock.io.codecs.compiled import CannotCompileError, Compiled, compiled
from penstock.io.codecs.kernels import Kernels, ScaleBlocks
from penstock.io.codecs.scaled import Offsets, Scaled
from penstock.io.codecs.tiles import TILES
from penstock.io.codecs.whole import Whole
from shares import shared

SHAPES = [
    ((300, 260), ScaleBlocks(128, 128)),  # the blocks at the edges are smaller
    ((7, 33), ScaleBlocks(0, 33)),
    ((64, 100), ScaleBlocks(1, 100)),
    ((64, 64), ScaleBlocks(1, 32)),
    ((13, 34), ScaleBlocks(3, 5)),
    ((5, 70_001), ScaleBlocks(128, 128)),  # a row is more than a tile
    ((3, 70_000), ScaleBlocks(1, 70_000)),
]
SIZES = shared([1, 20_000, 10**7], lambda place, _: place == 0)


@pytest.fixture(scope="module")
def compiled_kernels(tmp_path_factory: pytest.TempPathFactory) -> Compiled:
    folder: Path = tmp_path_factory.mktemp("compiled")
    try:
        return compiled(folder)
    except CannotCompileError as error:
        pytest.skip(str(error))


@pytest.fixture(params=["tiles", "compiled", "whole"])
def kernels(request: pytest.FixtureRequest) -> Kernels:
    if request.param == "tiles":
        return TILES
    if request.param == "whole":
        return Whole(most_numel=100)  # most tensors are decoded in several parts
    found: Compiled = request.getfixturevalue("compiled_kernels")
    return found


def spread(
    scales: torch.Tensor, blocks: ScaleBlocks, shape: tuple[int, int]
) -> torch.Tensor:
    """The scale of each number of `shape`."""
    rows, columns = shape
    down = scales.repeat_interleave(blocks.rows or rows, 0)[:rows]
    return down.repeat_interleave(blocks.columns, 1)[:, :columns]


@pytest.mark.parametrize("max_bytes", SIZES)
@pytest.mark.parametrize("kind", [torch.float8_e4m3fn, torch.float8_e5m2])
@pytest.mark.parametrize(("shape", "blocks"), SHAPES)
def test_8_bit_floats(
    shape: tuple[int, int],
    blocks: ScaleBlocks,
    kind: torch.dtype,
    max_bytes: int,
    kernels: Kernels,
) -> None:
    codes = Codes(str(kind).removeprefix("torch."))
    weight = random_tensor(kind, shape)  # NaNs and infinities are among them
    grid = blocks.grid(shape)
    for stored in (torch.float32, torch.bfloat16):
        scales = random_floats(stored, grid)
        for rounding in {torch.float32, stored}:
            factors = spread(scales.to(rounding), blocks, shape)
            wanted = weight.to(rounding) * factors
            for dtype in (torch.float32, torch.bfloat16):
                found = decoded_in_parts(
                    Scaled(codes, blocks, rounding),
                    [weight, scales],
                    shape,
                    dtype,
                    max_bytes,
                    kernels,
                )
                assert same_bits(found.nan_to_num(1), wanted.to(dtype).nan_to_num(1))
                assert torch.equal(found.isnan(), wanted.isnan())


@pytest.mark.parametrize("max_bytes", SIZES)
@pytest.mark.parametrize("has_zeros", [False, True])
@pytest.mark.parametrize(("shape", "blocks"), SHAPES)
def test_8_bit_integers(
    shape: tuple[int, int],
    blocks: ScaleBlocks,
    has_zeros: bool,
    max_bytes: int,
    kernels: Kernels,
) -> None:
    offsets = Offsets.INT8 if has_zeros else Offsets.NONE
    weight = random_tensor(torch.int8, shape)
    grid = blocks.grid(shape)
    zeros = random_tensor(torch.int8, grid)
    for kind in (torch.float32, torch.bfloat16, torch.float16):
        scales = random_floats(kind, grid)
        numbers = weight.to(kind)
        if has_zeros:
            numbers -= spread(zeros.to(kind), blocks, shape)
        wanted = numbers * spread(scales, blocks, shape)
        stored = [weight, scales, zeros] if has_zeros else [weight, scales]
        for dtype in (torch.float32, torch.bfloat16):
            codec = Scaled(Codes.INT8, blocks, kind, offsets)
            found = decoded_in_parts(codec, stored, shape, dtype, max_bytes, kernels)
            assert same_bits(found, wanted.to(dtype))


@pytest.mark.parametrize("max_bytes", SIZES)
@pytest.mark.parametrize("has_zeros", [False, True])
@pytest.mark.parametrize(
    ("shape", "group"), [((20, 64), 32), ((13, 72), 24), ((11, 8), 8), ((9, 40_000), 8)]
)
def test_4_bit_integers(
    shape: tuple[int, int],
    group: int,
    has_zeros: bool,
    max_bytes: int,
    kernels: Kernels,
) -> None:
    rows, columns = shape
    groups = columns // group
    offsets = Offsets.PACKED if has_zeros else Offsets.NONE
    weight = random_tensor(torch.int32, (rows, columns // 8))
    words = random_tensor(torch.int32, (-(-rows // 8), groups), seed=1)
    shifts = torch.arange(0, 32, 4)
    unpacked = ((weight[..., None] >> shifts) & 15).flatten(1) - 8
    zeros = ((words[:, None] >> shifts[:, None]) & 15).flatten(0, 1)[:rows] - 8
    for kind in (torch.float32, torch.bfloat16):
        scales = random_floats(kind, (rows, groups))
        numbers = unpacked.to(kind)
        if has_zeros:
            numbers -= zeros.to(kind).repeat_interleave(group, 1)
        wanted = numbers * scales.repeat_interleave(group, 1)
        stored = [weight, scales, words] if has_zeros else [weight, scales]
        for dtype in (torch.float32, torch.bfloat16):
            codec = Scaled(Codes.INT4, ScaleBlocks(1, group), kind, offsets)
            found = decoded_in_parts(codec, stored, shape, dtype, max_bytes, kernels)
            assert same_bits(found, wanted.to(dtype))


@pytest.mark.parametrize("max_bytes", [1, 20_000])
def test_4_bit_floats(max_bytes: int, kernels: Kernels) -> None:
    shape, blocks = (20, 96), ScaleBlocks(1, 32)
    weight = random_tensor(torch.uint8, (20, 48))
    numbers = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])
    numbers = torch.cat((numbers, -numbers))
    codes = torch.stack((weight & 15, weight >> 4), -1).flatten(1)
    scales = random_floats(torch.float32, blocks.grid(shape))
    wanted = numbers[codes.long()] * spread(scales, blocks, shape)
    for dtype in (torch.float32, torch.bfloat16):
        found = decoded_in_parts(
            Scaled(Codes.FLOAT4_E2M1, blocks),
            [weight, scales],
            shape,
            dtype,
            max_bytes,
            kernels,
        )
        assert same_bits(found, wanted.to(dtype))


@pytest.mark.parametrize("kind", [torch.uint8, torch.float8_e8m0fnu])
def test_scales_that_are_exponents(kind: torch.dtype, kernels: Kernels) -> None:
    shape, blocks = (64, 64), ScaleBlocks(1, 32)
    weight = random_floats(torch.float32, shape).to(torch.float8_e4m3fn)
    scales = torch.arange(64 * 2, dtype=torch.uint8).view(64, 2) + 60
    found = decoded_in_parts(
        Scaled(Codes.FLOAT8_E4M3, blocks),
        [weight, scales.view(kind)],
        shape,
        torch.float32,
        500,
        kernels,
    )
    powers = 2.0 ** (scales.double() - 127)
    wanted = weight.double() * spread(powers, blocks, shape)
    assert same_bits(found, wanted.float())


def test_a_target_with_strides(kernels: Kernels) -> None:
    shape, blocks = (30, 600), ScaleBlocks(16, 8)
    weight = random_floats(torch.float32, shape).to(torch.float8_e4m3fn)
    scales = random_floats(torch.float32, blocks.grid(shape))
    found = torch.empty(600, 30, dtype=torch.bfloat16)
    Scaled(Codes.FLOAT8_E4M3, blocks).decode([weight, scales], found.t(), kernels)
    wanted = (weight.float() * spread(scales, blocks, shape)).bfloat16()
    assert same_bits(found, wanted.t().contiguous())


@pytest.mark.parametrize("is_turned", [False, True])
def test_a_byte_lies_in_two_blocks(is_turned: bool, kernels: Kernels) -> None:
    """And a block is wider than a tile."""
    block = 301 if is_turned else 32_001
    shape, blocks = (3, 2 * block), ScaleBlocks(1, block)
    weight = random_tensor(torch.int32, (3, block)).to(torch.uint8)
    numbers = torch.stack((weight & 15, weight >> 4), -1).flatten(1).float() - 8
    scales = random_floats(torch.float32, blocks.grid(shape))
    found = torch.empty(shape)
    if is_turned:
        found = torch.empty(shape[::-1]).t()
    Scaled(Codes.INT4, blocks).decode([weight, scales], found, kernels)
    assert same_bits(found.contiguous(), numbers * spread(scales, blocks, shape))


def test_only_the_calling_thread_decodes() -> None:
    """Each call of torch has fewer elements than it divides among threads."""
    shape, blocks = (130, 4100), ScaleBlocks(128, 128)
    weight = random_floats(torch.float32, shape).to(torch.float8_e4m3fn)
    scales = random_floats(torch.float32, blocks.grid(shape))
    target = torch.empty(shape)
    with torch.profiler.profile(record_shapes=True) as profile:
        Scaled(Codes.FLOAT8_E4M3, blocks).decode([weight, scales], target, TILES)
    sizes = [
        torch.Size(shape).numel()
        for event in profile.events() or ()
        if event.name in ("aten::mul", "aten::copy_", "aten::index_select")
        for shape in event.input_shapes
        if shape
    ]
    assert sizes
    assert max(sizes) < 32_768

"""Packed weights of bfloat16 have all of their bits, in any parts, by any kernels."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_codecs import decoded_in_parts

from checkpoints import random_floats, random_tensor, same_bits
from penstock.io.codecs.compiled import CannotCompileError, Compiled, compiled
from penstock.io.codecs.kernels import Kernels
from penstock.io.codecs.lossless import Lossless
from penstock.io.codecs.packed import (
    PackedFloats,
    block_rows_of,
    columns_of,
    escapes,
    pack,
    row_bytes_of,
)
from penstock.io.codecs.tiles import TILES
from penstock.io.codecs.whole import WHOLE


@pytest.fixture(scope="module")
def compiled_kernels(tmp_path_factory: pytest.TempPathFactory) -> Compiled:
    folder: Path = tmp_path_factory.mktemp("compiled")
    try:
        return compiled(folder)
    except CannotCompileError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module", params=["tiles", "compiled", "whole"])
def kernels(request: pytest.FixtureRequest) -> Kernels:
    if request.param == "tiles":
        return TILES
    if request.param == "whole":
        return WHOLE
    found: Compiled = request.getfixturevalue("compiled_kernels")
    return found


def packed(weight: torch.Tensor) -> tuple[Lossless, list[torch.Tensor]]:
    """The codec of `weight`, and the stored tensors that it takes."""
    made, blocks = pack(weight)
    found = escapes(blocks)
    codec = Lossless(weight.shape[1], found is not None)
    return codec, [made] if found is None else [made, found]


def check(
    weight: torch.Tensor, kernels: Kernels, parts: Sequence[int] = (10**7,)
) -> None:
    codec, stored = packed(weight)
    rows, columns = weight.shape
    for max_bytes in parts:
        for dtype in (torch.bfloat16, torch.float32):
            found = decoded_in_parts(
                codec, stored, (rows, columns), dtype, max_bytes, kernels
            )
            assert same_bits(found, weight.to(dtype))


patterns = st.one_of(
    st.integers(0, 0xFFFF),
    st.sampled_from([0x0000, 0x8000, 0x0001, 0x7F80, 0xFF80, 0x7F81, 0xFFFF, 0x7FC0]),
    st.integers(0x3C00, 0x3CFF),
)
"""The bits of numbers: any, those that are special, and many of few exponents."""


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_any_bits(kernels: Kernels, data: st.DataObject) -> None:
    rows, columns = data.draw(st.integers(1, 9)), data.draw(st.integers(1, 40))
    count = rows * columns
    bits = data.draw(st.lists(patterns, min_size=count, max_size=count))
    weight = torch.tensor(bits, dtype=torch.int32).to(torch.int16)
    check(weight.view(torch.bfloat16).view(rows, columns), kernels)


def test_every_number_there_is(kernels: Kernels) -> None:
    numbers = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16)
    mixed = torch.randperm(1 << 16, generator=torch.Generator().manual_seed(0))
    for order in (numbers, numbers[mixed]):
        weight = order.view(torch.bfloat16)
        for columns in (1 << 16, 1 << 8, 1):
            check(weight.view(-1, columns), kernels)


@pytest.mark.parametrize(
    "shape", [(300, 260), (3, 70_001), (700, 257), (1, 1), (5, 2), (7000, 19)]
)
def test_parts_of_weights(shape: tuple[int, int], kernels: Kernels) -> None:
    """There are several blocks, and escapes in all of them."""
    weight = random_floats(torch.bfloat16, shape)
    weight[::7] *= 1e-20
    weight.view(-1)[::1001] = random_tensor(torch.bfloat16, (weight[:1].numel(),))[0]
    check(weight, kernels, (20_000, 10**7))


def test_rows_have_exponents_of_their_own(kernels: Kernels) -> None:
    weight = torch.rand(64, 512).add_(1).bfloat16()
    weight *= torch.exp2(torch.arange(-32, 32.0))[:, None].bfloat16()
    weight[:, ::5] = 0
    weight[3] = 0
    codec, stored = packed(weight)
    assert not codec.has_escapes
    assert stored[0].nbytes == 64 * (768 + 2)
    check(weight, kernels)


def test_weights_of_models_take_three_quarters(kernels: Kernels) -> None:
    weight = torch.randn(512, 1024, generator=torch.Generator().manual_seed(0)) / 50
    weight = weight.bfloat16()
    _, stored = packed(weight)
    assert sum(t.nbytes for t in stored) <= 0.755 * weight.nbytes
    check(weight, kernels, (40_000,))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float16])
def test_a_target_with_strides(dtype: torch.dtype, kernels: Kernels) -> None:
    weight = random_floats(torch.bfloat16, (90, 600))
    weight[4, 5] = 1e-30
    codec, stored = packed(weight)
    found = torch.empty(600, 90, dtype=dtype)
    codec.decode(stored, found.t(), kernels)
    assert same_bits(found, weight.to(dtype).t().contiguous())


def test_places_that_are_outside_mean_nothing(kernels: Kernels) -> None:
    """Whatever a file says, only numbers of the rows are written."""
    weight = random_floats(torch.bfloat16, (5, 12))
    made, _ = pack(weight)
    words = random_tensor(torch.int32, (1, 50)) | (60 << 8)
    numbers = PackedFloats(made, 12, words, block_rows_of(12))
    room = torch.zeros(9, 12, dtype=torch.bfloat16)
    kernels.write_packed(room[2:7], numbers)
    assert same_bits(room[2:7], weight)
    assert not room[:2].any()
    assert not room[7:].any()


def test_rows_say_how_many_columns_they_have() -> None:
    for columns in range(1, 3000):
        assert columns_of(row_bytes_of(columns)) == columns
    known = {row_bytes_of(columns) for columns in range(1, 100)}
    for nbytes in set(range(100)) - known:
        assert columns_of(nbytes) is None

"""What a codec decodes in parts, and from files, is what it decodes at once."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from row_scaled import RowScaled
from test_loader import opened

from checkpoints import random_floats, random_tensor, same_bits
from penstock.io.checkpoint.index import SINGLE_FILE, open_checkpoint
from penstock.io.codecs.cast import CAST
from penstock.io.codecs.codec import Codec
from penstock.io.codecs.computed import Computed
from penstock.io.codecs.kernels import Kernels
from penstock.io.codecs.tiles import TILES
from penstock.io.errors import CheckpointError
from penstock.io.extent import Extent
from penstock.io.weights.decoding import parts_of
from penstock.io.weights.recipe import Recipe, TensorSlice, View
from penstock.io.weights.steps import Decode, Input
from penstock.offload.weights.stored import check_readable
from recipes import write_packed

ROWS, COLUMNS = 50, 6


def decode_of(
    codec: Codec,
    tensors: Sequence[torch.Tensor],
    shape: tuple[int, int] = (ROWS, COLUMNS),
    dtype: torch.dtype = torch.float32,
) -> Decode:
    """The decode of tensors that lie in one file each, to a target of `shape`."""
    inputs = tuple(
        Input(Extent(Path(f"{i}"), 0, t.nbytes), t.dtype, View.whole(tuple(t.shape)))
        for i, t in enumerate(tensors)
    )
    whole = View.whole(shape)
    return Decode(codec, inputs, 0, dtype, whole.numel, whole)


def in_parts(
    decode: Decode,
    tensors: Sequence[torch.Tensor],
    max_bytes: int,
    kernels: Kernels = TILES,
) -> tuple[torch.Tensor, list[int]]:
    """What `decode` makes of `tensors` in parts, and the bytes that each part read."""
    result = torch.full(decode.target.shape, torch.nan, dtype=decode.target_dtype)
    sizes = []
    for inputs, rows in parts_of(decode, result, max_bytes):
        stored = []
        for each in inputs:
            content = tensors[int(each.extent.path.name)].reshape(-1).view(torch.uint8)
            part = content[each.extent.offset : each.extent.end].clone()
            stored.append(each.view.on(part.view(each.dtype)))
        decode.codec.decode(stored, rows, kernels)
        sizes.append(sum(each.extent.nbytes for each in inputs))
    return result, sizes


def decoded_in_parts(
    codec: Codec,
    tensors: Sequence[torch.Tensor],
    shape: tuple[int, int],
    dtype: torch.dtype,
    max_bytes: int,
    kernels: Kernels,
) -> torch.Tensor:
    """What `codec` makes of `tensors` in parts of at most about `max_bytes`."""
    decode = decode_of(codec, tensors, shape, dtype)
    return in_parts(decode, tensors, max_bytes, kernels)[0]


def scaled_tensors(rows_each: int) -> list[torch.Tensor]:
    return [
        random_tensor(torch.int8, (ROWS, COLUMNS)),
        random_floats(torch.float32, (-(-ROWS // rows_each),)),
        random_floats(torch.float32, (1,)),
    ]


@pytest.mark.parametrize("max_bytes", [1, 40, 100, 299, 10_000])
@pytest.mark.parametrize("rows_each", [1, 3, 16, 64])
def test_ranges_of_rows_with_their_scales(rows_each: int, max_bytes: int) -> None:
    tensors = scaled_tensors(rows_each)
    decode = decode_of(RowScaled(rows_each), tensors)
    wanted = torch.empty(ROWS, COLUMNS)
    decode.codec.decode(tensors, wanted, TILES)
    found, sizes = in_parts(decode, tensors, max_bytes)
    assert same_bits(found, wanted)
    least = min(rows_each, ROWS) * COLUMNS + 4 + 4
    assert max(sizes) <= max(least, max_bytes)
    assert (len(sizes) == 1) == (decode.stored_bytes <= max_bytes or rows_each == 64)


@pytest.mark.parametrize("max_bytes", [1, 7, 100, 10_000])
def test_a_cast_may_end_within_a_row(max_bytes: int) -> None:
    tensors = [random_floats(torch.bfloat16, (ROWS, COLUMNS))]
    found, sizes = in_parts(decode_of(CAST, tensors), tensors, max_bytes)
    assert same_bits(found, tensors[0].float())
    assert max(sizes) <= max(2, max_bytes)


def test_a_function_sees_whole_tensors() -> None:
    tensors = [random_floats(torch.float32, (COLUMNS, ROWS)), torch.ones(3)]
    codec = Computed(("a", "b"), lambda stored: stored["a"].t() * stored["b"].sum())
    found, sizes = in_parts(decode_of(codec, tensors), tensors, 1)
    assert same_bits(found, tensors[0].t() * 3)
    assert len(sizes) == 1


@pytest.mark.parametrize("is_turned", [False, True])
@pytest.mark.parametrize("bounce_bytes", [64, 1 << 20])
def test_a_codec_with_companions_by_the_loader(
    bounce_bytes: int, is_turned: bool, tmp_path: Path
) -> None:
    rows_each = 3
    stored = dict(
        zip(("numbers", "scales", "offset"), scaled_tensors(rows_each), strict=True)
    )
    write_packed(tmp_path / SINGLE_FILE, {"first": torch.ones(3), **stored})
    checkpoint = open_checkpoint(tmp_path)
    entry, *companions = (checkpoint.entries[name] for name in stored)
    source = View.whole((ROWS, COLUMNS))
    shape = (COLUMNS, ROWS) if is_turned else (ROWS, COLUMNS)
    whole = torch.empty(shape, device="meta")
    target = View.of(whole.t() if is_turned else whole)
    part = TensorSlice(entry, source, target, RowScaled(rows_each), tuple(companions))
    recipe = Recipe("it", shape, torch.bfloat16, (part,))
    wanted = torch.empty(ROWS, COLUMNS, dtype=torch.bfloat16)
    RowScaled(rows_each).decode(list(stored.values()), wanted, TILES)
    with opened(checkpoint, [recipe], bounce_bytes=bounce_bytes) as rig:
        made = rig.load()["it"]
        statistics = rig.loader.statistics()
    assert same_bits(made, wanted.t().contiguous() if is_turned else wanted)
    assert recipe.direct is recipe.stored_rows is None
    assert statistics.bytes_loaded == sum(t.nbytes for t in stored.values())
    assert statistics.bytes_copied >= statistics.bytes_loaded


@pytest.mark.parametrize("codec", [CAST, RowScaled(1)])
def test_integers_are_weights_only_with_a_codec_that_knows_them(
    codec: Codec, tmp_path: Path
) -> None:
    stored = dict(zip(("numbers", "scales", "offset"), scaled_tensors(1), strict=True))
    write_packed(tmp_path / SINGLE_FILE, stored)
    checkpoint = open_checkpoint(tmp_path)
    whole = View.whole((ROWS, COLUMNS))
    part = TensorSlice(checkpoint.entries["numbers"], whole, whole, codec)
    recipe = Recipe("it", (ROWS, COLUMNS), torch.float32, (part,))
    refused = pytest.raises(CheckpointError, match="the checkpoint is quantised")
    with refused if codec == CAST else contextlib.nullcontext():
        check_readable([recipe], checkpoint)

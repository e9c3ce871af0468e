"""The kernels for accelerators: operations on whole tensors, on the current stream."""

from dataclasses import replace

import torch

from .codes import Codes
from .kernels import ScaledNumbers
from .packed import PackedFloats, escapes_of, joined


class Whole:
    """See `Kernels`; the tensors are those of any device. The host waits for nothing.
    Needs memory for about four float32 for each of the numbers that are decoded at
    once: `most_numel`, or a row of blocks."""

    def __init__(self, most_numel: int = 4 << 20) -> None:
        self.most_numel = most_numel

    def write_scaled(self, target: torch.Tensor, numbers: ScaledNumbers) -> None:
        num_rows, num_columns = target.shape
        height = numbers.blocks.rows
        step = max(1, self.most_numel // num_columns)
        if height:
            step = max(height, step // height * height)
        for first in range(0, num_rows, step):
            last = min(first + step, num_rows)
            down = slice(first // height, -(-last // height)) if height else slice(1)
            part = replace(
                numbers,
                bytes=numbers.bytes[first:last],
                scales=numbers.scales[down],
                offsets=None if numbers.offsets is None else numbers.offsets[down],
            )
            _write_scaled(target[first:last], part)

    def write_packed(self, target: torch.Tensor, numbers: PackedFloats) -> None:
        columns = target.shape[1]
        stored, half = numbers.bytes, (columns + 1) // 2
        codes = stored[:, columns : columns + half]
        codes = torch.cat((codes & 15, codes[:, : columns - half] >> 4), 1)
        others, bases = stored[:, -2:-1], stored[:, -1:]
        exponents = torch.where(codes == 0, others, bases + codes)
        if numbers.escapes is not None:
            exponents = _escaped(exponents, numbers)
        bits = joined(stored[:, :columns], exponents)
        target.copy_(bits.view(torch.bfloat16))


WHOLE = Whole()


def _write_scaled(target: torch.Tensor, numbers: ScaledNumbers) -> None:
    rows, columns = target.shape
    made = _numbers(numbers.bytes, numbers.codes)[:, :columns]
    blocks = numbers.blocks.rows, numbers.blocks.columns
    if numbers.offsets is not None:
        made = made - _spread(numbers.offsets, blocks, rows, columns)
    made = made * _spread(numbers.scales, blocks, rows, columns)
    target.copy_(made.to(numbers.rounding))


def _escaped(exponents: torch.Tensor, numbers: PackedFloats) -> torch.Tensor:
    """`exponents` ([rows, columns]) with those that are listed apart. The host does not
    wait to know how many there are."""
    places, found = escapes_of(numbers, len(exponents))
    flat = torch.cat((exponents.flatten(), exponents.new_zeros(1)))
    return flat.scatter_(0, places, found)[:-1].view(exponents.shape)


def _numbers(stored: torch.Tensor, codes: Codes) -> torch.Tensor:
    """What the codes in bytes mean: float32, [rows, columns]."""
    if codes.per_byte == 1:
        kind: torch.dtype = getattr(torch, codes.value)
        return stored.view(kind).to(torch.float32)
    each = torch.stack((stored & 15, stored >> 4), -1).flatten(1)
    if codes is Codes.INT4:
        return each.to(torch.float32) - 8.0
    size = (each & 7).to(torch.int32)
    # Two bits of exponent and one of fraction, as those of float32; the smallest have
    # no exponent.
    bits = torch.where(size < 2, size * (126 << 23), (size << 22) + (126 << 23))
    bits |= (each >> 3).to(torch.int32) << 31
    return bits.view(torch.float32)


def _spread(
    values: torch.Tensor, blocks: tuple[int, int], rows: int, columns: int
) -> torch.Tensor:
    """The value of each number: [rows, columns], or [1, columns] if all rows share."""
    down, across = blocks
    found = values[:, :, None].expand(-1, -1, across).flatten(1)[:, :columns]
    if not down or down == 1:
        return found
    return found[:, None].expand(-1, down, -1).flatten(0, 1)[:rows]

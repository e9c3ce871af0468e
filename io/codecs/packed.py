"""Numbers of bfloat16 in 12 bits each: what the bytes mean, and how they are made.

The weights of a model have few different exponents. Each takes 4 bits instead of 8; an
exponent that is none of the usual ones of its row is listed apart. Sign and fraction
are kept as they are, so that every number keeps its bits.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

_BLOCK_NUMEL = 1 << 16
_MOST_COLUMNS = (1 << 24) - 2
"""A position within a block has 24 bits; the greatest one means nothing."""
_IN_A_ROW = 14
"""Exponents that follow one another and have a code."""
_ESCAPE = 15


@dataclass(frozen=True, slots=True)
class PackedFloats:
    """Numbers of bfloat16, in 12 bits each and a few escapes.

    Each row has its own 15 exponents: codes 1 ... 14 are the exponents `base + code`
    (modulo 256), which follow one another, and code 0 is one more, `other`. Code 15 is
    an escape: its exponent is listed apart.
    """

    bytes: torch.Tensor
    """uint8, [rows, columns + half + 2], where half is columns / 2, rounded up.
    First the sign (the highest bit) and the fraction of each number; then the codes, of
    column i in the lower half of byte i, of column half + i in its upper half; last
    `other` and `base`."""
    columns: int
    escapes: torch.Tensor | None
    """int32, [blocks of rows, most escapes of a block]: the position in the block, row
    by row, in the upper 24 bits, and the exponent in the lower 8. Those whose position
    is outside of the block (-1, say) mean nothing. None if there are no escapes."""
    block_rows: int
    """Rows of a block; the last may have fewer."""


def joined(rest: torch.Tensor, exponents: torch.Tensor) -> torch.Tensor:
    """The bits of bfloat16 numbers, from their signs and fractions and from their
    exponents (both uint8, of one shape): int16."""
    wide = rest.to(torch.int16)
    return (wide & 0x80) << 8 | exponents.to(torch.int16) << 7 | (wide & 0x7F)


def escapes_of(
    numbers: PackedFloats, num_rows: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """The place of each escape in `num_rows` rows, row by row (int64), and its
    exponent (uint8). Places of those that mean nothing are behind the last number."""
    assert numbers.escapes is not None, "there are no escapes"
    words = numbers.escapes.to(torch.int64)
    positions, exponents = (words >> 8) & 0xFFFFFF, (words & 0xFF).to(torch.uint8)
    block = numbers.block_rows * numbers.columns
    blocks = torch.arange(len(words), device=words.device)[:, None] * block
    end = num_rows * numbers.columns
    places = torch.where(positions < block, positions + blocks, end).clamp_(max=end)
    return places.flatten(), exponents.flatten()


def block_rows_of(columns: int) -> int:
    """Rows of a block, of weights with so many `columns`."""
    return max(1, _BLOCK_NUMEL // max(1, columns))


def row_bytes_of(columns: int) -> int:
    """Bytes of a row, without escapes."""
    return columns + (columns + 1) // 2 + 2


def columns_of(row_bytes: int) -> int | None:
    """The columns of a row that has `row_bytes`; None if no row has so many."""
    columns = 2 * (row_bytes - 2) // 3
    is_sound = columns > 0 and row_bytes_of(columns) == row_bytes
    return columns if is_sound and columns <= _MOST_COLUMNS else None


def pack(weight: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """The bytes of `weight` (bfloat16, [rows, columns], on the CPU), as `PackedFloats`
    has them, and the escapes of each block of rows: int32."""
    rows, columns = weight.shape
    bits = weight.contiguous().view(torch.int16)
    exponents = ((bits >> 7) & 0xFF).to(torch.int32)
    lines = torch.arange(rows, dtype=torch.int32, device="cpu")[:, None]
    counts = torch.bincount((exponents + (lines << 8)).flatten(), minlength=rows << 8)
    counts = counts.view(rows, 256)
    sums = torch.nn.functional.pad(counts.cumsum(1), (1, 0))
    firsts = (sums[:, _IN_A_ROW:] - sums[:, :-_IN_A_ROW]).argmax(1)[:, None]
    span = firsts + torch.arange(_IN_A_ROW, device="cpu")
    others = counts.scatter(1, span, -1).argmax(1)[:, None]
    codes = exponents - firsts.to(torch.int32) + 1
    is_other = exponents == others
    codes.masked_fill_((codes < 1) | (codes > _IN_A_ROW), _ESCAPE)
    codes.masked_fill_(is_other, 0)
    small = codes.to(torch.uint8)
    half = (columns + 1) // 2
    upper = torch.nn.functional.pad(small[:, half:], (0, 2 * half - columns))
    made = torch.empty(rows, row_bytes_of(columns), dtype=torch.uint8, device="cpu")
    made[:, :columns] = ((bits >> 8) & 0x80 | bits & 0x7F).to(torch.uint8)
    made[:, columns : columns + half] = small[:, :half] | upper << 4
    made[:, -2:-1] = others.to(torch.uint8)
    made[:, -1:] = (firsts - 1).to(torch.uint8)
    block = block_rows_of(columns) * columns
    places = torch.nonzero((codes == _ESCAPE).flatten())[:, 0]
    words = places % block << 8 | exponents.flatten()[places]
    sizes = torch.bincount(places // block, minlength=-(-rows * columns // block))
    signed = torch.where(words < 1 << 31, words, words - (1 << 32)).to(torch.int32)
    return made, list(torch.split(signed, sizes.tolist()))


def escapes(blocks: Sequence[torch.Tensor]) -> torch.Tensor | None:
    """The escapes of all blocks as one tensor: int32, [blocks, most escapes of a block,
    an even number]; None if there are none."""
    most = max((len(block) for block in blocks), default=0)
    if not most:
        return None
    made = torch.full(
        (len(blocks), most + most % 2), -1, dtype=torch.int32, device="cpu"
    )
    for row, block in zip(made, blocks, strict=True):
        row[: len(block)] = block
    return made

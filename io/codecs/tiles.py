"""Multiplies numbers by the scales of their blocks, a small tile at a time."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

TILE_NUMEL = 32_000
"""Fewer elements than torch computes in parallel (at::internal::GRAIN_SIZE, 32,768):
what is made of tiles uses the calling thread only, and stays in its caches."""
_TURNED_COLUMNS = 256
"""The columns of a tile whose rows do not lie in memory as rows: it is narrow, so that
neighbours in memory are written together."""

Numbers = Callable[[slice, slice, torch.Tensor], None]
"""Writes the numbers in a range of rows and a range of columns to a tensor of one
dimension (float32), on the calling thread only."""


@dataclass(frozen=True, slots=True)
class ScaleBlocks:
    """ScaleBlocks of `rows` x `columns` numbers that share a scale.

    Those at the right and lower edges of a tensor may be smaller.
    """

    rows: int
    """0 if all rows share their scales."""
    columns: int

    def grid(self, shape: tuple[int, ...]) -> tuple[int, int]:
        """How many blocks a tensor of `shape` has: down and across."""
        rows, columns = shape
        return -(-rows // self.rows) if self.rows else 1, -(-columns // self.columns)


def write_scaled(
    target: torch.Tensor,
    numbers: Numbers,
    scales: torch.Tensor,
    blocks: ScaleBlocks,
    *,
    rounding: torch.dtype,
    offsets: torch.Tensor | None = None,
    column_step: int = 1,
) -> None:
    """Writes `(number - offset) * scale` to `target` ([rows, columns], any strides).

    `scales` (any shape; exponents if they are bytes) and `offsets` have one value for
    each of `blocks`. The product, of float32, is rounded to `rounding`, then to the
    dtype of `target`. Tiles begin at multiples of `column_step` columns.
    """
    num_rows, num_columns = target.shape
    grid = (-1, -(-num_columns // blocks.columns))
    scratch = torch.empty(TILE_NUMEL, dtype=torch.float32, device=target.device)
    rounded = None
    if rounding not in (torch.float32, target.dtype):
        rounded = torch.empty(TILE_NUMEL, dtype=rounding, device=target.device)
    step = blocks.columns
    if step % column_step:
        step *= column_step
    is_turned = num_rows > 1 and target.stride(0) < target.stride(1)
    most_columns = _TURNED_COLUMNS if is_turned else TILE_NUMEL
    for columns in _spans(num_columns, most_columns, step):
        width = columns.stop - columns.start
        across = _touched(columns, blocks.columns)
        most_rows = TILE_NUMEL // width
        factors = _Values(scales.reshape(grid)[:, across], blocks, width)
        shifts = None
        if offsets is not None:
            shifts = _Values(offsets.reshape(grid)[:, across], blocks, width)
        shape = factors.shape
        tiles = scratch[: most_rows * width].view(most_rows, *shape)
        goal = target[:, columns]
        if len(shape) > 1:
            goal = torch.unflatten(goal, 1, shape)
        for rows in _spans(num_rows, most_rows, blocks.rows or num_rows):
            height = rows.stop - rows.start
            numbers(rows, columns, scratch[: height * width])
            tile, there = tiles[:height], goal[rows]
            if shifts is not None:
                torch.sub(tile, shifts.at(rows), out=tile)
            if target.dtype == torch.float32 and rounded is None:
                torch.mul(tile, factors.at(rows), out=there)
                continue
            torch.mul(tile, factors.at(rows), out=tile)
            if rounded is not None:
                tile = rounded[: tile.numel()].view(tile.shape).copy_(tile)
            there.copy_(tile)


class _Values:
    """The values of `blocks`, [down, across], in the columns of one tile of `width`."""

    def __init__(self, values: torch.Tensor, blocks: ScaleBlocks, width: int) -> None:
        across = values.shape[1]
        is_even = across > 1 and across * blocks.columns == width
        self.shape = (across, blocks.columns) if is_even else (width,)
        """The columns of a tile: [blocks, columns of a block], if all are whole."""
        self._values = values
        self._blocks = blocks
        self._down = slice(-1)
        self._last: torch.Tensor | None = None

    def at(self, rows: slice) -> torch.Tensor:
        """The values for the numbers of `rows`: can be broadcast to
        [rows, *self.shape]."""
        down = _touched(rows, self._blocks.rows)
        num_down = down.stop - down.start
        if self._last is not None and num_down == 1 and down == self._down:
            return self._last
        found = _numbers(self._values[down])
        if num_down > 1 and self._blocks.rows > 1:
            found = found[:, None].expand(-1, self._blocks.rows, -1).flatten(0, 1)
            found = found[: rows.stop - rows.start]
        if len(self.shape) > 1:
            found = found[..., None]
        elif found.shape[1] > 1:
            found = found[..., None].expand(-1, -1, self._blocks.columns)
            found = found.flatten(1)[:, : self.shape[0]]
        self._down, self._last = down, found
        return found


def _numbers(values: torch.Tensor) -> torch.Tensor:
    """Stored `values` in float32: numbers of any dtype, or unsigned bytes, which are
    exponents of two, plus 127."""
    if values.dtype == torch.uint8:
        return (values.to(torch.float32) - 127.0).exp2()
    return values.to(torch.float32)


def _touched(span: slice, block: int) -> slice:
    """The blocks that `span` lies in; the first if `block` is 0."""
    if not block:
        return slice(0, 1)
    return slice(span.start // block, -(-span.stop // block))


def _spans(size: int, most: int, block: int) -> Iterator[slice]:
    """Cuts `size` into ranges of at most `most`; each lies in one block, or is whole
    blocks."""
    outer = max(block, most // block * block)
    for start in range(0, size, outer):
        end = min(start + outer, size)
        for first in range(start, end, most):
            yield slice(first, min(first + most, end))

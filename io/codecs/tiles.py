"""The kernels in torch: numbers are written a small tile at a time."""

from collections.abc import Iterator

import torch

from .kernels import ScaleBlocks, ScaledNumbers
from .packed import PackedFloats, escapes_of, joined

_TILE_NUMEL = 32_000
"""Fewer elements than torch computes in parallel (at::internal::GRAIN_SIZE, 32,768):
what is made of tiles uses the calling thread only, and stays in its caches."""
_TURNED_COLUMNS = 256
"""The columns of a tile whose rows do not lie in memory as rows: it is narrow, so that
neighbours in memory are written together."""


class Tiles:
    """See `Kernels`. The reference: it needs nothing but torch."""

    def write_scaled(self, target: torch.Tensor, numbers: ScaledNumbers) -> None:
        num_rows, num_columns = target.shape
        blocks, rounding = numbers.blocks, numbers.rounding
        scratch = torch.empty(_TILE_NUMEL, dtype=torch.float32, device="cpu")
        rounded = None
        if rounding not in (torch.float32, target.dtype):
            rounded = torch.empty(_TILE_NUMEL, dtype=rounding, device="cpu")
        step = blocks.columns
        if step % numbers.codes.per_byte:
            step *= numbers.codes.per_byte
        is_turned = num_rows > 1 and target.stride(0) < target.stride(1)
        most_columns = _TURNED_COLUMNS if is_turned else _TILE_NUMEL
        lookup = _Lookup(numbers)
        for columns in _spans(num_columns, most_columns, step):
            width = columns.stop - columns.start
            across = _touched(columns, blocks.columns)
            most_rows = _TILE_NUMEL // width
            factors = _Values(numbers.scales[:, across], blocks, columns)
            shifts = None
            if numbers.offsets is not None:
                shifts = _Values(numbers.offsets[:, across], blocks, columns)
            shape = factors.shape
            tiles = scratch[: most_rows * width].view(most_rows, *shape)
            goal = target[:, columns]
            if len(shape) > 1:
                goal = torch.unflatten(goal, 1, shape)
            for rows in _spans(num_rows, most_rows, blocks.rows or num_rows):
                height = rows.stop - rows.start
                lookup.read(rows, columns, scratch[: height * width])
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

    def write_packed(self, target: torch.Tensor, numbers: PackedFloats) -> None:
        num_rows, num_columns = target.shape
        stored, half = numbers.bytes, (num_columns + 1) // 2
        for start, end, shift in ((0, half, 0), (half, num_columns, 4)):
            for columns in _spans(end - start, _TILE_NUMEL, 1):
                first, last = start + columns.start, start + columns.stop
                at = num_columns + columns.start
                for rows in _spans(num_rows, _TILE_NUMEL // (last - first), 1):
                    tile = stored[rows]
                    codes = (tile[:, at : at + last - first] >> shift) & 15
                    others, bases = tile[:, -2:-1], tile[:, -1:]
                    exponents = torch.where(codes == 0, others, codes + bases)
                    bits = joined(tile[:, first:last], exponents)
                    target[rows, first:last] = bits.view(torch.bfloat16)
        if numbers.escapes is None:
            return
        places, exponents = escapes_of(numbers, num_rows)
        is_used = places < num_rows * num_columns
        lines, columns_at = _divided(places[is_used], num_columns)
        found = joined(stored[lines, columns_at], exponents[is_used])
        target[lines, columns_at] = found.view(torch.bfloat16).to(target.dtype)


TILES = Tiles()


class _Lookup:
    """Looks up what bytes mean; it has memory for a tile of them.

    Torch casts 8-bit floats one at a time; a table is three times as fast, and exact.
    """

    def __init__(self, numbers: ScaledNumbers) -> None:
        self._bytes = numbers.bytes
        self._per_byte = numbers.codes.per_byte
        # An entry is one element, of as many bytes as its numbers.
        self._dtype = torch.float32 if self._per_byte == 1 else torch.int64
        self._table = numbers.codes.table.view(self._dtype)[:, 0]
        self._index = torch.empty(_TILE_NUMEL, dtype=torch.int32, device="cpu")

    def read(self, rows: slice, columns: slice, out: torch.Tensor) -> None:
        """Writes the numbers of `rows` and `columns` to `out`, of one dimension."""
        first, last = (
            columns.start // self._per_byte,
            -(-columns.stop // self._per_byte),
        )
        codes = self._bytes[rows, first:last]
        index = self._index[: codes.numel()]
        index.view(codes.shape).copy_(codes)
        torch.index_select(self._table, 0, index, out=out.view(self._dtype))


class _Values:
    """The values of `blocks`, [down, across], in the `columns` of one tile."""

    def __init__(
        self, values: torch.Tensor, blocks: ScaleBlocks, columns: slice
    ) -> None:
        across, width = values.shape[1], columns.stop - columns.start
        is_even = across > 1 and across * blocks.columns == width
        self.shape = (across, blocks.columns) if is_even else (width,)
        """The columns of a tile: [blocks, columns of a block], if all are whole."""
        self._values = values
        self._blocks = blocks
        self._first = columns.start % blocks.columns
        """Columns of the first block that lie left of the tile."""
        self._down = slice(-1)
        self._last: torch.Tensor | None = None

    def at(self, rows: slice) -> torch.Tensor:
        """The values for the numbers of `rows`: can be broadcast to
        [rows, *self.shape]."""
        down = _touched(rows, self._blocks.rows)
        num_down = down.stop - down.start
        if self._last is not None and num_down == 1 and down == self._down:
            return self._last
        found = self._values[down]
        if num_down > 1 and self._blocks.rows > 1:
            found = found[:, None].expand(-1, self._blocks.rows, -1).flatten(0, 1)
            found = found[: rows.stop - rows.start]
        if len(self.shape) > 1:
            found = found[..., None]
        elif found.shape[1] > 1:
            found = found[..., None].expand(-1, -1, self._blocks.columns)
            found = found.flatten(1)[:, self._first : self._first + self.shape[0]]
        self._down, self._last = down, found
        return found


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


def _divided(
    places: torch.Tensor, num_columns: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """The rows and the columns of `places`, which count row by row."""
    rows = torch.div(places, num_columns, rounding_mode="floor")
    return rows, places - rows * num_columns

"""Tables of the numbers that small codes mean.

Torch casts 8-bit floats one at a time; a table is three times as fast, and exact.
"""

import functools

import torch

from .tiles import TILE_NUMEL


@functools.cache
def of_bytes(kind: torch.dtype) -> torch.Tensor:
    """The number that each of the 256 bytes means as `kind`, a dtype of 8 bits: in
    float32."""
    codes = torch.arange(256, dtype=torch.uint8, device="cpu")
    return codes.view(kind).to(torch.float32)


@functools.cache
def of_halves(numbers: tuple[float, ...]) -> torch.Tensor:
    """For each of the 256 bytes, the two of the 16 `numbers` that its lower and its
    upper half mean: an int64 that holds both in float32."""
    table = torch.tensor(numbers, dtype=torch.float32, device="cpu")
    codes = torch.arange(256, device="cpu")
    pairs = torch.stack((table[codes % 16], table[codes // 16]), -1)
    return pairs.view(torch.int64)[:, 0].clone()


class Lookup:
    """Looks up the entries of `table` for bytes; it has memory for a tile of them."""

    def __init__(self, table: torch.Tensor) -> None:
        self._table = table
        self._index = torch.empty(TILE_NUMEL, dtype=torch.int32, device="cpu")

    def read(self, codes: torch.Tensor, out: torch.Tensor) -> None:
        """Writes the entries for `codes` (uint8, [rows, columns]) to `out`, which has
        one dimension and float32. Runs on the calling thread only."""
        index = self._index[: codes.numel()]
        index.view(codes.shape).copy_(codes)
        torch.index_select(self._table, 0, index, out=out.view(self._table.dtype))

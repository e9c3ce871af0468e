"""Weights of 4-bit integers, eight of them in a word, a scale for each group."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from .tables import Lookup, of_halves
from .tiles import TILE_NUMEL, ScaleBlocks, write_scaled

_NUMBERS = tuple(float(code - 8) for code in range(16))
_PER_WORD = 8


@dataclass(frozen=True, slots=True)
class PackedIntegers:
    """Multiplies 4-bit integers by the scales of their groups; see `Codec`.

    The stored tensors are the weight (int32, [rows, columns / 8], the first number of a
    word in its lowest bits, each plus 8), its scales (floats, [rows, groups]), and the
    numbers that zero is stored as (int32, [rows / 8, groups], packed in the same way
    down the rows), where `has_zeros`.
    """

    columns: int
    """How many numbers of a row are a group."""
    rounding: torch.dtype
    """The dtype of the product, before it is cast to that of the target."""
    has_zeros: bool = False

    @property
    def identity(self) -> str:
        return f"int4-1 {self.columns} {self.rounding} {self.has_zeros}"

    @property
    def rows_each(self) -> tuple[int, ...]:
        return (1, 1, _PER_WORD) if self.has_zeros else (1, 1)

    @property
    def is_elementwise(self) -> bool:
        return False

    def decode(self, stored: Sequence[torch.Tensor], target: torch.Tensor) -> None:
        weight, scales, *zeros = stored
        num_rows = len(target)
        step = num_rows
        if zeros:  # they are unpacked for so many rows at a time
            step = max(1, TILE_NUMEL // (_PER_WORD * scales.shape[1])) * _PER_WORD
        lookup = Lookup(of_halves(_NUMBERS))
        for start in range(0, num_rows, step):
            rows = slice(start, min(start + step, num_rows))
            words = slice(start // _PER_WORD, -(-rows.stop // _PER_WORD))
            offsets = _down_the_rows(zeros[0][words], rows) if zeros else None
            self._decode(lookup, weight[rows], scales[rows], offsets, target[rows])

    def _decode(
        self,
        lookup: Lookup,
        weight: torch.Tensor,
        scales: torch.Tensor,
        offsets: torch.Tensor | None,
        target: torch.Tensor,
    ) -> None:
        codes = weight.view(torch.uint8)

        def numbers(rows: slice, columns: slice, out: torch.Tensor) -> None:
            lookup.read(codes[rows, columns.start // 2 : columns.stop // 2], out)

        write_scaled(
            target,
            numbers,
            scales,
            ScaleBlocks(1, self.columns),
            rounding=self.rounding,
            offsets=offsets,
            column_step=2,
        )


def _down_the_rows(words: torch.Tensor, rows: slice) -> torch.Tensor:
    """The numbers of `rows` in `words` (int32, [rows / 8, groups]): [rows, groups]."""
    shifts = torch.arange(0, 32, 4, dtype=torch.int32, device=words.device)
    numbers = (words[:, None, :] >> shifts[:, None]).bitwise_and_(15).sub_(8)
    return numbers.flatten(0, 1)[: rows.stop - rows.start]

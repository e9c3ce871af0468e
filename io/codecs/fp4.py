"""Weights of 4-bit floats, two of them in a byte, a scale for each block."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from .tables import Lookup, of_halves
from .tiles import ScaleBlocks, write_scaled

_POSITIVE = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_NUMBERS = _POSITIVE + tuple(-number for number in _POSITIVE)
"""What each code means (E2M1)."""


@dataclass(frozen=True, slots=True)
class PackedFloats:
    """Multiplies 4-bit floats by the scales of their blocks; see `Codec`.

    The stored tensors are the weight ([rows, columns / 2] of bytes, the first number in
    the lower half) and its scales: floats of any dtype, or bytes that are exponents of
    two, plus 127.
    """

    blocks: ScaleBlocks

    @property
    def identity(self) -> str:
        return f"fp4-1 {self.blocks.rows}x{self.blocks.columns}"

    @property
    def rows_each(self) -> tuple[int, ...]:
        return (1, self.blocks.rows)

    @property
    def is_elementwise(self) -> bool:
        return False

    def decode(self, stored: Sequence[torch.Tensor], target: torch.Tensor) -> None:
        weight, scales = stored
        codes = weight.view(torch.uint8)
        lookup = Lookup(of_halves(_NUMBERS))

        def numbers(rows: slice, columns: slice, out: torch.Tensor) -> None:
            lookup.read(codes[rows, columns.start // 2 : columns.stop // 2], out)

        write_scaled(
            target,
            numbers,
            scales,
            self.blocks,
            rounding=torch.float32,
            column_step=2,
        )

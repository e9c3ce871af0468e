"""Weights of 8-bit integers, a scale for each block."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from .tiles import ScaleBlocks, write_scaled


@dataclass(frozen=True, slots=True)
class ScaledIntegers:
    """Multiplies 8-bit integers by the scales of their blocks; see `Codec`.

    The stored tensors are the weight (int8, [rows, columns]), its scales (floats), and
    the numbers that zero is stored as (int8), where `has_zeros`.
    """

    blocks: ScaleBlocks
    rounding: torch.dtype
    """The dtype of the product, before it is cast to that of the target."""
    has_zeros: bool = False

    @property
    def identity(self) -> str:
        size = f"{self.blocks.rows}x{self.blocks.columns}"
        return f"int8-1 {size} {self.rounding} {self.has_zeros}"

    @property
    def rows_each(self) -> tuple[int, ...]:
        rows = self.blocks.rows
        return (1, rows, rows) if self.has_zeros else (1, rows)

    @property
    def is_elementwise(self) -> bool:
        return False

    def decode(self, stored: Sequence[torch.Tensor], target: torch.Tensor) -> None:
        weight, scales, *zeros = stored

        def numbers(rows: slice, columns: slice, out: torch.Tensor) -> None:
            tile = weight[rows, columns]
            out.view(tile.shape).copy_(tile)

        write_scaled(
            target,
            numbers,
            scales,
            self.blocks,
            rounding=self.rounding,
            offsets=zeros[0] if zeros else None,
        )

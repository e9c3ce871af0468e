"""Weights of 8-bit floats, a scale for each block."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from .tables import Lookup, of_bytes
from .tiles import ScaleBlocks, write_scaled


@dataclass(frozen=True, slots=True)
class ScaledFloats:
    """Multiplies 8-bit floats by the scales of their blocks; see `Codec`.

    The stored tensors are the weight ([rows, columns], a float dtype of 8 bits) and its
    scales: floats of any dtype, or bytes that are exponents of two, plus 127.
    """

    blocks: ScaleBlocks
    rounding: torch.dtype = torch.float32
    """The dtype of the product, before it is cast to that of the target."""

    @property
    def identity(self) -> str:
        size = f"{self.blocks.rows}x{self.blocks.columns}"
        return f"fp8-1 {size} {self.rounding}"

    @property
    def rows_each(self) -> tuple[int, ...]:
        return (1, self.blocks.rows)

    @property
    def is_elementwise(self) -> bool:
        return False

    def decode(self, stored: Sequence[torch.Tensor], target: torch.Tensor) -> None:
        weight, scales = stored
        codes = weight.view(torch.uint8)
        lookup = Lookup(of_bytes(weight.dtype))

        def numbers(rows: slice, columns: slice, out: torch.Tensor) -> None:
            lookup.read(codes[rows, columns], out)

        write_scaled(target, numbers, scales, self.blocks, rounding=self.rounding)

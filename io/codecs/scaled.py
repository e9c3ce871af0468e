"""Weights of small codes that are multiplied by the scales of their blocks."""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum

import torch

from .codes import Codes
from .kernels import Kernels, ScaleBlocks, ScaledNumbers

_PER_WORD = 8
"""4-bit integers in an int32."""


class Offsets(Enum):
    """How the numbers are stored that are subtracted from the codes of a block."""

    NONE = "none"
    INT8 = "int8"
    """[blocks down, blocks across], int8."""
    PACKED = "packed"
    """[blocks down / 8, blocks across], int32 of 4-bit integers plus 8, the first in
    the lowest bits, packed down the rows. Each row is a block."""


class Divisor(Enum):
    """A number that all scales are divided by: a float of one element."""

    NONE = "none"
    STORED = "stored"
    INVERSE = "inverse"
    """What is stored is one over it."""


@dataclass(frozen=True, slots=True)
class Scaled:
    """Multiplies `codes` by the scales of their `blocks`; see `Codec`.

    The stored tensors are the codes ([rows, columns / those in an element], any dtype
    of integers or 8-bit floats), the scales (floats, or unsigned bytes, which are
    exponents of two, plus 127), the `offsets`, and the `divisor`.
    """

    codes: Codes
    blocks: ScaleBlocks
    rounding: torch.dtype = torch.float32
    """The dtype of the product, before it is cast to that of the target."""
    offsets: Offsets = Offsets.NONE
    divisor: Divisor = Divisor.NONE

    @property
    def name(self) -> str:
        return self.codes.value

    @property
    def identity(self) -> str:
        size = f"{self.blocks.rows}x{self.blocks.columns}"
        offsets = f"{self.offsets.value} {self.divisor.value}"
        return f"scaled-1 {self.codes.value} {size} {self.rounding} {offsets}"

    @property
    def rows_each(self) -> tuple[int, ...]:
        rows = self.blocks.rows
        offsets = {Offsets.INT8: (rows,), Offsets.PACKED: (_PER_WORD,)}
        return (
            1,
            rows,
            *offsets.get(self.offsets, ()),
            *((0,) if self.divisor is not Divisor.NONE else ()),
        )

    @property
    def is_elementwise(self) -> bool:
        return False

    @property
    def uses_kernels(self) -> bool:
        return True

    def decode(
        self, stored: Sequence[torch.Tensor], target: torch.Tensor, kernels: Kernels
    ) -> None:
        weight, stored_scales, *others = stored
        grid = self.blocks.grid(tuple(target.shape))
        scales = _numbers(stored_scales)
        if self.divisor is not Divisor.NONE:
            divisor = _numbers(others.pop())
            if self.divisor is Divisor.INVERSE:
                divisor = 1 / divisor
            scales = scales / divisor
        offsets = None
        if self.offsets is Offsets.INT8:
            offsets = _numbers(others[0]).reshape(grid)
        elif self.offsets is Offsets.PACKED:
            offsets = _down_the_rows(others[0], grid[0])
        numbers = ScaledNumbers(
            weight.view(torch.uint8),
            self.codes,
            self.blocks,
            scales.reshape(grid).contiguous(),
            offsets,
            self.rounding,
        )
        kernels.write_scaled(target, numbers)


def _numbers(stored: torch.Tensor) -> torch.Tensor:
    """Numbers of any dtype in float32; unsigned bytes are exponents."""
    if stored.dtype == torch.uint8:
        # The bits of a power of two; those of the smallest, 2 ** -127, are not shifted.
        bits = (stored.to(torch.int32) << 23).masked_fill_(stored == 0, 1 << 22)
        return bits.view(torch.float32)
    return stored.to(torch.float32)


def _down_the_rows(words: torch.Tensor, num_rows: int) -> torch.Tensor:
    """The first `num_rows` rows of 4-bit integers packed in `words`: float32."""
    shifts = torch.arange(0, 32, 4, dtype=torch.int32, device=words.device)
    numbers = (words[:, None, :] >> shifts[:, None]).bitwise_and_(15).sub_(8)
    return numbers.flatten(0, 1)[:num_rows].to(torch.float32)

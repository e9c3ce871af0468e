"""The contract of the loops that write numbers: one in torch, one compiled."""

from dataclasses import dataclass
from typing import Protocol

import torch

from .codes import Codes
from .packed import PackedFloats


@dataclass(frozen=True, slots=True)
class ScaleBlocks:
    """Blocks of `rows` x `columns` numbers that share a scale.

    Those at the right and lower edges of a tensor may be smaller.
    """

    rows: int
    """0 if all rows share their scales."""
    columns: int

    def grid(self, shape: tuple[int, ...]) -> tuple[int, int]:
        """How many blocks a tensor of `shape` has: down and across."""
        rows, columns = shape
        return -(-rows // self.rows) if self.rows else 1, -(-columns // self.columns)


@dataclass(frozen=True, slots=True)
class ScaledNumbers:
    """Numbers `(code - offset) * scale`, as they are stored."""

    bytes: torch.Tensor
    """The codes: uint8, [rows, columns / codes of a byte], columns side by side."""
    codes: Codes
    blocks: ScaleBlocks
    scales: torch.Tensor
    """float32, [blocks down, blocks across], contiguous."""
    offsets: torch.Tensor | None
    """Like `scales`; None if all are zero."""
    rounding: torch.dtype
    """The product, of float32, is rounded to this dtype first: a floating dtype of 16
    or 32 bits."""


class Kernels(Protocol):
    """Loops over the elements of tensors on the CPU.

    All kernels make the same bits, but for those of NaNs. They run on the calling
    thread only, and are used by several threads at once.
    """

    def write_scaled(self, target: torch.Tensor, numbers: ScaledNumbers) -> None:
        """Writes `numbers` to `target` ([rows, columns], any strides, a floating dtype)
        and casts them to its dtype."""
        ...

    def write_packed(self, target: torch.Tensor, numbers: PackedFloats) -> None:
        """Writes `numbers` to `target` ([rows, columns], any strides, a floating dtype)
        and casts them to its dtype. NaNs keep their bits in bfloat16."""
        ...

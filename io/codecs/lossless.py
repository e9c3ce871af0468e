"""Weights of bfloat16 in three quarters of their bytes, with all of their bits."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from .kernels import Kernels
from .packed import PackedFloats, block_rows_of


@dataclass(frozen=True, slots=True)
class Lossless:
    """Unpacks rows of `columns` numbers; see `Codec` and `PackedFloats`.

    The stored tensors are the rows (uint8, [rows, bytes of a row]) and, where
    `has_escapes`, the escapes (int32, [blocks of rows, escapes of a block]).
    """

    columns: int
    has_escapes: bool

    @property
    def name(self) -> str:
        return "lossless"

    @property
    def identity(self) -> str:
        return f"lossless-1 {self.columns} {self.has_escapes}"

    @property
    def block_rows(self) -> int:
        """Rows whose escapes stand together."""
        return block_rows_of(self.columns)

    @property
    def rows_each(self) -> tuple[int, ...]:
        return (1, self.block_rows) if self.has_escapes else (1,)

    @property
    def is_elementwise(self) -> bool:
        return False

    @property
    def uses_kernels(self) -> bool:
        return True

    def decode(
        self, stored: Sequence[torch.Tensor], target: torch.Tensor, kernels: Kernels
    ) -> None:
        rows, *escapes = stored
        numbers = PackedFloats(
            rows, self.columns, escapes[0] if escapes else None, self.block_rows
        )
        kernels.write_packed(target, numbers)

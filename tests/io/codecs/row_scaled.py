"""A codec for tests: integers with one scale for several rows, and one offset."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from penstock.io.codecs.kernels import Kernels


@dataclass(frozen=True)
class RowScaled:
    """Row r is `stored[r] * scales[r // rows] + offset`; see `Codec`."""

    rows: int

    @property
    def name(self) -> str:
        return "scaled rows"

    @property
    def identity(self) -> str:
        return f"scaled-1 {self.rows}"

    @property
    def rows_each(self) -> tuple[int, ...]:
        return (1, self.rows, 0)

    @property
    def is_elementwise(self) -> bool:
        return False

    @property
    def uses_kernels(self) -> bool:
        return False

    def decode(
        self, stored: Sequence[torch.Tensor], target: torch.Tensor, kernels: Kernels
    ) -> None:
        numbers, scales, offset = stored
        assert len(scales) == -(-len(numbers) // self.rows)
        each = scales.repeat_interleave(self.rows, dim=0)[: len(numbers)]
        target.copy_(numbers.to(torch.float32) * each[:, None] + offset)

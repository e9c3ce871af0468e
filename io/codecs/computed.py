"""Parameters that a function computes from whole stored tensors."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch

from .kernels import Kernels

Compute = Callable[[Mapping[str, torch.Tensor]], torch.Tensor]
"""Computes a parameter from whole stored tensors, given by their names."""


@dataclass(frozen=True, slots=True)
class Computed:
    """Calls `compute` with the stored tensors called `names`; see `Codec`.

    For transformations that no other codec has. Nothing is made until all tensors have
    been read.
    """

    names: tuple[str, ...]
    compute: Compute = field(repr=False)

    @property
    def name(self) -> str:
        return "computed"

    @property
    def identity(self) -> str:
        return "computed-1"

    @property
    def rows_each(self) -> tuple[int, ...]:
        return (0,) * len(self.names)

    @property
    def is_elementwise(self) -> bool:
        return False

    @property
    def uses_kernels(self) -> bool:
        return False

    def decode(
        self, stored: Sequence[torch.Tensor], target: torch.Tensor, kernels: Kernels
    ) -> None:
        made = self.compute(dict(zip(self.names, stored, strict=True)))
        target.copy_(made.to(target.dtype))

"""The contract of a codec."""

from collections.abc import Sequence
from typing import Protocol

import torch

from .kernels import Kernels


class Codec(Protocol):
    """Makes a part of a parameter from stored tensors.

    The stored tensors are the one of the slice and its companions (scales, say), in
    this order. A codec decodes ranges of rows, so that a large tensor passes a small
    buffer. It is an immutable value, used by several threads at once.
    """

    @property
    def name(self) -> str:
        """What it decodes, as reports and machine files call it."""
        ...

    @property
    def identity(self) -> str:
        """Its name, its version, and what else its results depend on.

        Processes share decoded memory only if they agree in this.
        """
        ...

    @property
    def rows_each(self) -> tuple[int, ...]:
        """For each stored tensor, how many rows of the result one of its rows makes.

        A row is an index of the first dimension. 0 if every row of the result needs the
        whole tensor.
        """
        ...

    @property
    def is_elementwise(self) -> bool:
        """Whether each element is made from one stored element at the same index.

        Then a range may begin and end within a row.
        """
        ...

    @property
    def uses_kernels(self) -> bool:
        """Whether `decode` calls `kernels`."""
        ...

    def decode(
        self, stored: Sequence[torch.Tensor], target: torch.Tensor, kernels: Kernels
    ) -> None:
        """Writes the rows of `target` (any strides), made from those of `stored`.

        All are on one device. A stored tensor has the rows that `rows_each` says, in
        its stored dtype. Runs on the calling thread only, by `kernels` where they have
        the loops. Raises what torch raises for contents that cannot be decoded.
        """
        ...

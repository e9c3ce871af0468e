"""What a parameter is made of: which parts of which stored tensors land where.

Most parameters are one stored tensor as it is. Others are stacked from many (experts),
cut from one (fused projections), or cast to another dtype on the way in.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from ..checkpoint.header import TensorEntry
from ..extent import Extent


@dataclass(frozen=True, slots=True)
class View:
    """A strided part of a contiguous tensor, in elements."""

    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]

    @classmethod
    def whole(cls, shape: tuple[int, ...]) -> "View":
        stride, step = [], 1
        for size in reversed(shape):
            stride.append(step)
            step *= size
        return cls(0, shape, tuple(reversed(stride)))

    @classmethod
    def of(cls, tensor: torch.Tensor) -> "View":
        return cls(
            int(tensor.storage_offset()), tuple(tensor.shape), tuple(tensor.stride())
        )

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def is_contiguous(self) -> bool:
        expected = 1
        for size, stride in zip(
            reversed(self.shape), reversed(self.stride), strict=True
        ):
            if size != 1 and stride != expected:
                return False
            expected *= size
        return True

    def on(self, flat: torch.Tensor) -> torch.Tensor:
        """This view of the one-dimensional tensor `flat`."""
        return flat.as_strided(
            self.shape, self.stride, flat.storage_offset() + self.offset
        )


@dataclass(frozen=True, slots=True)
class TensorSlice:
    """A part of a stored tensor and the part of the parameter that it fills."""

    entry: TensorEntry
    source: View
    target: View

    @property
    def source_extent(self) -> Extent | None:
        """The bytes to read, where they are one range; else None."""
        if not self.source.is_contiguous:
            return None
        size = self.entry.dtype.itemsize
        return Extent(
            self.entry.path,
            self.entry.offset + self.source.offset * size,
            self.source.numel * size,
        )


Convert = Callable[[Mapping[str, torch.Tensor]], torch.Tensor]
"""Builds a parameter from whole stored tensors, by name."""


@dataclass(frozen=True, slots=True)
class Recipe:
    """How one parameter of the model is made from the checkpoint.

    Either `pieces` fill it, or (for transformations that are no views) `convert` makes
    it from the whole tensors of `entries`.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    pieces: tuple[TensorSlice, ...] = ()
    convert: Convert | None = None
    entries: tuple[TensorEntry, ...] = ()

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    @property
    def direct(self) -> Extent | None:
        """The one byte range of a file that *is* this parameter, or None where it
        must be assembled or cast. Rows of it can be gathered."""
        if len(self.pieces) != 1 or self.pieces[0].entry.dtype != self.dtype:
            return None
        return self.stored_rows

    @property
    def stored_rows(self) -> Extent | None:
        """The one byte range that holds this parameter in the stored dtype, or None."""
        if len(self.pieces) != 1:
            return None
        piece = self.pieces[0]
        if piece.target != View.whole(self.shape):
            return None
        return piece.source_extent

    @property
    def stored_bytes(self) -> int:
        """Bytes that must be read to make this parameter."""
        if self.convert is not None:
            return sum(entry.nbytes for entry in self.entries)
        return sum(
            piece.source.numel * piece.entry.dtype.itemsize
            if piece.source.is_contiguous
            else piece.entry.nbytes
            for piece in self.pieces
        )


def plain(entry: TensorEntry, *, name: str, dtype: torch.dtype) -> Recipe:
    """The recipe of a parameter that is `entry`, cast to `dtype` where they differ."""
    whole = View.whole(entry.shape)
    return Recipe(name, entry.shape, dtype, (TensorSlice(entry, whole, whole),))

"""Says which parts of which stored tensors make a parameter.

Most parameters are one stored tensor, unchanged. Others are stacked from many tensors
(experts), cut from one (fused projections), or cast to another dtype while loading.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from ..checkpoint.header import TensorEntry
from ..extent import Extent


@dataclass(frozen=True, slots=True)
class View:
    """A strided part of a contiguous tensor. All numbers count elements, not bytes."""

    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]

    @classmethod
    def whole(cls, shape: tuple[int, ...]) -> "View":
        """All elements of a contiguous tensor of `shape`."""
        stride, step = [], 1
        for size in reversed(shape):
            stride.append(step)
            step *= size
        return cls(0, shape, tuple(reversed(stride)))

    @classmethod
    def of(cls, tensor: torch.Tensor) -> "View":
        """The part of its storage that `tensor` (any shape and dtype) views."""
        return cls(
            int(tensor.storage_offset()), tuple(tensor.shape), tuple(tensor.stride())
        )

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def is_contiguous(self) -> bool:
        """Whether the elements lie one behind the other in the tensor."""
        expected = 1
        for size, stride in zip(
            reversed(self.shape), reversed(self.stride), strict=True
        ):
            if size != 1 and stride != expected:
                return False
            expected *= size
        return True

    def on(self, flat: torch.Tensor) -> torch.Tensor:
        """This part of `flat` (one-dimensional, any dtype), as a view of `shape`.

        Raises RuntimeError when the storage of `flat` is too short.
        """
        return flat.as_strided(
            self.shape, self.stride, flat.storage_offset() + self.offset
        )


@dataclass(frozen=True, slots=True)
class TensorSlice:
    """A part of a stored tensor, and the part of the parameter that it fills."""

    entry: TensorEntry
    source: View
    target: View

    @property
    def source_extent(self) -> Extent | None:
        """The byte range of `source` in the file; None when it is not one range."""
        if not self.source.is_contiguous:
            return None
        size = self.entry.dtype.itemsize
        return Extent(
            self.entry.path,
            self.entry.offset + self.source.offset * size,
            self.source.numel * size,
        )


Convert = Callable[[Mapping[str, torch.Tensor]], torch.Tensor]
"""Computes a parameter from whole stored tensors, given by their names."""


@dataclass(frozen=True, slots=True)
class Recipe:
    """How one parameter of the model is made from the checkpoint.

    Either `slices` fill it part by part, or `convert` computes it from the whole
    tensors of `entries`, for transformations that are not views.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    slices: tuple[TensorSlice, ...] = ()
    convert: Convert | None = None
    entries: tuple[TensorEntry, ...] = ()

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    @property
    def direct(self) -> Extent | None:
        """The byte range of a file that holds exactly this parameter.

        None when the parameter must be assembled or cast. Single rows can be read from
        this range.
        """
        if len(self.slices) != 1 or self.slices[0].entry.dtype != self.dtype:
            return None
        return self.stored_rows

    @property
    def stored_rows(self) -> Extent | None:
        """The byte range that holds this parameter in its stored dtype.

        None when the parameter must be assembled.
        """
        if len(self.slices) != 1:
            return None
        part = self.slices[0]
        if part.target != View.whole(self.shape):
            return None
        return part.source_extent

    @property
    def stored_bytes(self) -> int:
        """Bytes to read from files to make this parameter."""
        if self.convert is not None:
            return sum(entry.nbytes for entry in self.entries)
        return sum(
            part.source.numel * part.entry.dtype.itemsize
            if part.source.is_contiguous
            else part.entry.nbytes
            for part in self.slices
        )


def plain(entry: TensorEntry, *, name: str, dtype: torch.dtype) -> Recipe:
    """The recipe of a parameter that is the stored tensor `entry`, cast to `dtype`."""
    whole = View.whole(entry.shape)
    return Recipe(name, entry.shape, dtype, (TensorSlice(entry, whole, whole),))

"""Says which parts of which stored tensors make a parameter.

Most parameters are one stored tensor, unchanged. Others are stacked from many tensors
(experts), cut from one (fused projections), or decoded by a codec while loading.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache

import torch

from ..checkpoint.header import TensorEntry
from ..codecs.cast import CAST
from ..codecs.codec import Codec
from ..codecs.computed import Compute, Computed
from ..extent import Extent


@dataclass(frozen=True)
class View:
    """A strided part of a contiguous tensor. All numbers count elements, not bytes.

    Thousands of tensors share few views, which know what they have once worked out.
    """

    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]

    def __hash__(self) -> int:
        return self._hash

    @cached_property
    def _hash(self) -> int:
        return hash((self.offset, self.shape, self.stride))

    @classmethod
    @lru_cache(maxsize=4096)
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

    @cached_property
    def numel(self) -> int:
        return math.prod(self.shape)

    @cached_property
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
    codec: Codec = CAST
    """How the elements of `target` are made from those of `source`."""
    companions: tuple[TensorEntry, ...] = ()
    """The other stored tensors that the codec needs."""
    companion_views: tuple[View, ...] = ()
    """The contiguous part of each companion that it needs; wholes, if empty."""

    @property
    def entries(self) -> tuple[TensorEntry, ...]:
        """All stored tensors that it is made of, as the codec takes them."""
        return (self.entry, *self.companions)

    @property
    def stored_bytes(self) -> int:
        """Bytes to read from files for it."""
        if self.source.is_contiguous:
            nbytes = self.source.numel * self.entry.dtype.itemsize
        else:
            nbytes = self.entry.nbytes
        if not self.companion_views:
            return nbytes + sum(entry.nbytes for entry in self.companions)
        return nbytes + sum(v.numel * e.dtype.itemsize for e, v in self.companion_parts)

    @property
    def companion_parts(self) -> tuple[tuple[TensorEntry, View], ...]:
        """The companions, each with the part of it that the codec needs."""
        wholes = tuple(View.whole(entry.shape) for entry in self.companions)
        views = self.companion_views or wholes
        return tuple(zip(self.companions, views, strict=True))

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


@dataclass(frozen=True)
class Recipe:
    """How one parameter of the model is made from the checkpoint: part by part."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    slices: tuple[TensorSlice, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    @property
    def entries(self) -> tuple[TensorEntry, ...]:
        """The stored tensors that the parameter is made of."""
        return tuple(entry for part in self.slices for entry in part.entries)

    @property
    def direct(self) -> Extent | None:
        """The byte range of a file that holds exactly this parameter.

        None when the parameter must be assembled or decoded. Single rows can be read
        from this range.
        """
        if len(self.slices) != 1 or self.slices[0].entry.dtype != self.dtype:
            return None
        return self.stored_rows

    @property
    def stored_rows(self) -> Extent | None:
        """The byte range that holds this parameter in its stored dtype.

        None when the parameter must be assembled, or needs another codec than a cast.
        """
        if len(self.slices) != 1 or self.slices[0].codec != CAST:
            return None
        part = self.slices[0]
        if part.target != View.whole(self.shape):
            return None
        return part.source_extent

    @cached_property
    def stored_bytes(self) -> int:
        """Bytes to read from files to make this parameter."""
        return sum(part.stored_bytes for part in self.slices)


def plain(entry: TensorEntry, *, name: str, dtype: torch.dtype) -> Recipe:
    """The recipe of a parameter that is the stored tensor `entry`, cast to `dtype`."""
    whole = View.whole(entry.shape)
    return Recipe(name, entry.shape, dtype, (TensorSlice(entry, whole, whole),))


def computed(
    name: str,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    compute: Compute,
    entries: Sequence[TensorEntry],
) -> Recipe:
    """The recipe of a parameter that `compute` makes from the whole `entries`."""
    first, *others = entries
    codec = Computed(tuple(entry.name for entry in entries), compute)
    source, target = View.whole(first.shape), View.whole(shape)
    part = TensorSlice(first, source, target, codec, tuple(others))
    return Recipe(name, shape, dtype, (part,))

"""How far weights are from those of the original: sums over a tensor, and over the
tensors of a unit."""

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch

_CHUNK_NUMEL = 1 << 20
"""Elements that are compared at a time: their float64 copies take 8 MiB each."""


@dataclass(frozen=True, slots=True)
class WeightError:
    """The difference of a tensor, or of several together, from the original's."""

    name: str
    num_weights: int
    is_identical: bool
    """Whether every bit is equal."""
    squared_difference: float
    """The sum of the squares of the differences."""
    squared_original: float
    """The sum of the squares of the original's weights."""
    largest: float
    """The largest absolute difference."""

    @property
    def relative(self) -> float | None:
        """The Frobenius norm of the difference, divided by that of the original. None
        where that is no number: the original is all zeros, or weights are infinite or
        NaN."""
        if self.is_identical or self.squared_difference == 0:
            return 0.0
        if self.squared_original == 0:
            return None
        found = math.sqrt(self.squared_difference / self.squared_original)
        return found if math.isfinite(found) else None


@dataclass(frozen=True, slots=True)
class UnitError:
    """The difference of a block of the model, or of a module outside of blocks."""

    total: WeightError
    """All tensors together, under the name of the unit."""
    worst: WeightError | None
    """The tensor with the largest relative error; None if all are identical."""
    num_tensors: int
    num_identical: int
    """How many tensors are identical."""
    stored_bytes: int
    """Bytes of the unit in the files of the model."""
    original_bytes: int
    """Bytes of the unit in the files of the original."""


def unit_of(name: str) -> str:
    """The block or the module that the tensor `name` belongs to: "model.layers.3" for
    "model.layers.3.mlp.up_proj.weight", "lm_head" for "lm_head.weight"."""
    parts = name.split(".")
    for index, part in enumerate(parts[:-1]):
        if part.isdigit():
            return ".".join(parts[: index + 1])
    return ".".join(parts[:-1]) or name


def weight_error(
    name: str, tensor: torch.Tensor, original: torch.Tensor
) -> WeightError:
    """Compares two tensors of one shape and dtype, on the CPU. Sums are in float64, of
    a part of the tensors at a time."""
    one, other = tensor.detach().reshape(-1), original.detach().reshape(-1)
    difference = squares = largest = 0.0
    is_identical = True
    for start in range(0, one.numel(), _CHUNK_NUMEL):
        a, b = one[start : start + _CHUNK_NUMEL], other[start : start + _CHUNK_NUMEL]
        values = b.double()
        squares += float(values.dot(values))
        if torch.equal(_bits(a), _bits(b)):
            continue
        is_identical = False
        values = a.double() - values
        difference += float(values.dot(values))
        most = float(values.abs().max())
        largest = most if math.isnan(most) else max(largest, most)
    return WeightError(name, one.numel(), is_identical, difference, squares, largest)


def _bits(flat: torch.Tensor) -> torch.Tensor:
    return flat.contiguous().view(torch.uint8)


def added(name: str, errors: Iterable[WeightError]) -> WeightError:
    """The error of all tensors of `errors` together."""
    found = list(errors)
    most = [error.largest for error in found]
    return WeightError(
        name,
        sum(error.num_weights for error in found),
        all(error.is_identical for error in found),
        math.fsum(error.squared_difference for error in found),
        math.fsum(error.squared_original for error in found),
        math.nan if any(map(math.isnan, most)) else max(most, default=0.0),
    )


def worst_of(errors: Iterable[WeightError]) -> WeightError | None:
    """The error that is relatively the largest, one that is no number before all
    others; None if all are identical."""
    differing = [error for error in errors if not error.is_identical]

    def size(error: WeightError) -> float:
        return math.inf if error.relative is None else error.relative

    return max(differing, key=size, default=None)

"""Tells which units are alike: what they are made of lies in files in the same way.

Units that are alike make tensors of the same shapes and dtypes by the same codecs. What
they read lies in the same order, as far behind a multiple of `alignment` bytes, and as
far apart, or too far apart (more than `max_gap_bytes`) to be read at once. So they are
laid out in the same way. Names differ, and places in files.
"""

from collections.abc import Hashable, Sequence
from itertools import chain

import numpy as np
import numpy.typing as npt

from ...io.checkpoint.header import TensorEntry
from ...io.weights.recipe import Recipe, TensorSlice

_FILE = 1 << 45
"""More bytes than a file has. Offsets in several files are put one behind the other."""
_FIRST = -_FILE
"""Stands for the distance of the first tensor of a file."""


def likeness(
    recipes: Sequence[Recipe], *, alignment: int, max_gap_bytes: int
) -> Hashable:
    """What the `recipes` of a unit have in common with those of units alike."""
    entries = list(chain.from_iterable(recipe.entries for recipe in recipes))
    (places,) = _places([entries], alignment, max_gap_bytes)
    return made_alike(recipes), places


def made_alike(recipes: Sequence[Recipe]) -> Hashable:
    """What is made, and of what, wherever that lies."""
    return tuple(
        (recipe.shape, recipe.dtype, tuple(map(_made, recipe.slices)))
        for recipe in recipes
    )


def places_alike(
    pieces: Sequence[Sequence[Sequence[TensorSlice]]],
    *,
    alignment: int,
    max_gap_bytes: int,
) -> list[Hashable]:
    """How that lies of which the pieces of a stack are made: of each piece, and each of
    its tensors, the slices."""
    entries = [[e for s in chain.from_iterable(p) for e in s.entries] for p in pieces]
    return _places(entries, alignment, max_gap_bytes)


def _made(part: TensorSlice) -> Hashable:
    stored = tuple([(entry.dtype, entry.shape) for entry in part.entries])
    return part.codec, part.source, part.target, part.companion_views, stored


def _places(
    units: Sequence[Sequence[TensorEntry]], alignment: int, max_gap_bytes: int
) -> list[Hashable]:
    """How the stored tensors of each unit lie, at once for units of equally many."""
    if len(set(map(len, units))) != 1:
        alone = ([unit] for unit in units)
        return [_places(each, alignment, max_gap_bytes)[0] for each in alone]
    flat = list(chain.from_iterable(units))
    names = [str(entry.path) for entry in flat]
    files = {name: index for index, name in enumerate(sorted(set(names)))}
    shape = len(units), len(units[0])
    file = _array([files[name] for name in names], shape)
    offset = _array([entry.offset for entry in flat], shape)
    nbytes = _array([entry.nbytes for entry in flat], shape)
    order = np.lexsort((nbytes, offset, file), axis=-1)
    file, offset, nbytes = (
        np.take_along_axis(each, order, axis=1) for each in (file, offset, nbytes)
    )
    base = file * _FILE
    ends = np.maximum.accumulate(base + offset + nbytes, axis=1)[:, :-1]
    far = max_gap_bytes + 2 * alignment
    gaps = np.minimum(base[:, 1:] + offset[:, 1:] - ends, far)
    is_next = file[:, 1:] == file[:, :-1]
    found = [order, np.where(is_next, gaps, _FIRST), offset % alignment]
    return [row.tobytes() for row in np.concatenate(found, axis=1)]


def _array(values: list[int], shape: tuple[int, int]) -> npt.NDArray[np.int64]:
    return np.array(values, dtype=np.int64).reshape(shape)

"""Recipes of the output rows that one rank has of a matrix product. Pure."""

import math
from collections.abc import Sequence
from dataclasses import replace

from ...io.codecs.cast import CAST
from ...io.weights.recipe import Recipe, TensorSlice, View
from ..units.expert_cuts import cut, is_divisible, row_range

ROWS = 8
"""Parts begin at multiples of this: others change the last bits of products."""
LEAST_ROWS = 16
"""A part has as many rows at least: products with less have other last bits."""
Bounds = Sequence[tuple[int, int]]
"""The first row of each rank's part, and the row after its last one."""


def bounds_of(num_rows: int, num_ranks: int, step: int = ROWS) -> Bounds | None:
    """Divides `num_rows` rows at multiples of `step`, so that parts differ by two steps
    at most. None if there are less than `LEAST_ROWS` for a rank."""
    num_steps = num_rows // step
    starts = [num_steps * rank // num_ranks * step for rank in range(num_ranks)]
    bounds = list(zip(starts, [*starts[1:], num_rows], strict=True))
    if min(high - low for low, high in bounds) < LEAST_ROWS:
        return None
    return bounds


def step_of(recipe: Recipe) -> int:
    """The number of rows of `recipe` that are decoded together, or a multiple of it: of
    `ROWS`, too."""
    each = (rows for part in recipe.slices for rows in part.codec.rows_each)
    return math.lcm(ROWS, *filter(None, each))


def row_parts(recipe: Recipe, bounds: Bounds) -> list[Recipe] | None:
    """The parts `bounds` of the first dimension of `recipe`, each made of its own bytes
    alone. None if they cannot be."""
    if is_divisible(recipe):
        return cut(recipe, bounds)
    if len(recipe.slices) != 1 or recipe.slices[0].target.shape != recipe.shape:
        return None
    found = []
    for low, high in bounds:
        part = row_range(recipe.slices[0], low, high - low)
        if part is None:
            return None
        shape = (high - low, *recipe.shape[1:])
        at_start = replace(part, target=View.whole(shape))
        found.append(Recipe(recipe.name, shape, recipe.dtype, (at_start,)))
    return found


def column_parts(recipe: Recipe, bounds: Bounds) -> list[Recipe] | None:
    """The parts `bounds` of the last dimension of `recipe`. To read one, all of the
    stored tensor is read. None if it is made of more than one stored tensor."""
    if len(recipe.slices) != 1 or len(recipe.shape) != 2:
        return None
    (part,) = recipe.slices
    is_plain = part.codec == CAST and not part.companions
    if not (is_plain and part.target == View.whole(recipe.shape) == part.source):
        return None
    return [_columns(recipe, part, low, high) for low, high in bounds]


def _columns(recipe: Recipe, part: TensorSlice, low: int, high: int) -> Recipe:
    shape = (recipe.shape[0], high - low)
    source = View(part.source.offset + low, shape, part.source.stride)
    moved = replace(part, source=source, target=View.whole(shape))
    return Recipe(recipe.name, shape, recipe.dtype, (moved,))

"""Cuts the recipes of stacked experts into pieces, which are ranges of experts."""

from collections.abc import Mapping, Sequence
from functools import lru_cache

from ...io.checkpoint.header import TensorEntry
from ...io.codecs.cast import CAST
from ...io.weights.layout import TENSOR_ALIGNMENT
from ...io.weights.recipe import Recipe, TensorSlice, View
from .sites import FoundUnit


def cut(recipe: Recipe, bounds: Sequence[tuple[int, int]]) -> list[Recipe]:
    """The recipes of the ranges `bounds` (ascending, all together) of `recipe`, along
    its first dimension. It is divisible."""
    found: list[list[TensorSlice]] = [[] for _ in bounds]
    row = _row_of(recipe)
    at = [index for index, (low, high) in enumerate(bounds) for _ in range(low, high)]
    for part in recipe.slices:
        rows = first, last = _rows(part.target, row)
        for index in range(at[first], at[last] + 1):
            low, high = bounds[index]
            start, end = max(low, first), min(high, last + 1)
            found[index].append(_between(part, row, rows, start, end, low))
    return [
        Recipe(
            recipe.name, (high - low, *recipe.shape[1:]), recipe.dtype, tuple(slices)
        )
        for (low, high), slices in zip(bounds, found, strict=True)
    ]


def slices_of_pieces(
    recipes: Sequence[Recipe], bounds: Sequence[tuple[int, int]]
) -> list[tuple[list[TensorSlice], ...]] | None:
    """The slices of each of the pieces `bounds` (as in `cut`), for each of `recipes`.

    None if a stored tensor goes to several pieces.
    """
    at = [index for index, (low, high) in enumerate(bounds) for _ in range(low, high)]
    pieces: list[tuple[list[TensorSlice], ...]] = [
        tuple([] for _ in recipes) for _ in bounds
    ]
    for which, recipe in enumerate(recipes):
        row = _row_of(recipe)
        for part in recipe.slices:
            first, last = _rows(part.target, row)
            if at[first] != at[last]:
                return None
            pieces[at[first]][which].append(part)
    return pieces


def piece_recipes(
    recipes: Sequence[Recipe],
    experts: tuple[int, int],
    slices: Sequence[Sequence[TensorSlice]],
) -> list[Recipe]:
    """The recipes of the piece `experts`, made of its `slices` (see
    `slices_of_pieces`)."""
    low, high = experts
    found = []
    for recipe, parts in zip(recipes, slices, strict=True):
        row = _row_of(recipe)
        moved = []
        for part in parts:
            first, last = _rows(part.target, row)
            moved.append(_between(part, row, (first, last), first, last + 1, low))
        shape = (high - low, *recipe.shape[1:])
        found.append(Recipe(recipe.name, shape, recipe.dtype, tuple(moved)))
    return found


def unit_recipes(unit: FoundUnit, recipes: Mapping[str, Recipe]) -> list[Recipe]:
    """How the tensors of `unit` are made: all of each, or those of its experts."""
    mine = [recipes[name] for name in unit.tensors]
    if unit.experts is None:
        return mine
    low, high = unit.experts
    return [_middle(recipe, low, high) for recipe in mine]


def bytes_of(unit: FoundUnit, recipes: Mapping[str, Recipe]) -> int:
    """Bytes of the tensors of `unit`, in the dtype that is computed in."""
    nbytes = 0
    for recipe in (recipes[name] for name in unit.tensors):
        low, high = unit.experts or (0, 1)
        num = 1 if unit.experts is None else recipe.shape[0]
        nbytes += recipe.nbytes * (high - low) // num
    return nbytes


def _middle(recipe: Recipe, low: int, high: int) -> Recipe:
    bounds = ((0, low), (low, high), (high, recipe.shape[0]))
    return cut(recipe, bounds)[1]


def keeps_residues(recipe: Recipe) -> bool:
    """Whether an expert's matrix has one address modulo 64 bytes in a piece and in the
    whole. The bits of products depend on it."""
    expert_bytes = recipe.nbytes // max(1, recipe.shape[0])
    return len(recipe.shape) < 3 or expert_bytes % TENSOR_ALIGNMENT == 0


def is_divisible(recipe: Recipe) -> bool:
    """Whether each of its rows can be made by itself, of its own bytes."""
    row = _row_of(recipe)
    if not row:
        return False
    for part in recipe.slices:
        first, last = _rows(part.target, row)
        if first == last:
            if not part.source.is_contiguous:
                return False  # each piece would read the whole stored tensor
            continue
        entry = part.entry
        if part.codec != CAST or part.companions:
            height, rest = divmod(part.target.shape[0], last - first + 1)
            if rest or part.target.offset % row or row_range(part, 0, height) is None:
                return False
            continue
        if not entry.shape:
            return False
        stored_row = View.whole(entry.shape).stride[0]
        steps = part.source.stride[:1], part.target.stride[:1]
        if steps != ((stored_row,), (row,)) or part.source.shape != part.target.shape:
            return False
        if _rows(_one(part.target), row)[0] != _rows(_one(part.target), row)[1]:
            return False
        low, high = _rows(_one(part.source), stored_row)
        if low != high or part.target.shape[0] != last - first + 1:
            return False
    return True


def _row_of(recipe: Recipe) -> int:
    """The number of elements of one expert."""
    return recipe.nbytes // recipe.dtype.itemsize // max(1, recipe.shape[0])


def _between(
    part: TensorSlice, row: int, rows: tuple[int, int], start: int, end: int, low: int
) -> TensorSlice:
    """The rows `start` ... `end` of `part`, which has the `rows` of a parameter (the
    first and the last one), in a parameter that begins at row `low`."""
    (first, last), target = rows, part.target
    offset = target.offset - low * row
    if first == last:
        moved = View(offset, target.shape, target.stride)
        return _slice(part, part.entry, part.source, moved, part.companions)
    num, skipped = end - start, start - first
    if part.codec is not CAST or part.companions:
        height = target.shape[0] // (last - first + 1)
        return _row_range(part, skipped * height, num * height, offset)
    stored_row = part.source.stride[0]
    begin = part.source.offset // stored_row + skipped
    source = part.source
    return _slice(
        part,
        rows_of(part.entry, begin, begin + num),
        View(source.offset % stored_row, (num, *source.shape[1:]), source.stride),
        View(offset + skipped * row, (num, *target.shape[1:]), target.stride),
        part.companions,
    )


def row_range(part: TensorSlice, start: int, num: int) -> TensorSlice | None:
    """The slice that makes `num` rows of the target of `part`, from the row `start` on,
    and reads nothing else but what every row needs.

    The target and the stored tensors of `part` are whole tensors of rows. None where
    they are not, or where the range ends inside of rows that are decoded together.
    """
    target, rows_each = part.target, part.codec.rows_each
    wholes = View.whole(part.entry.shape) == part.source and not part.companion_views
    is_rows = wholes and target.is_contiguous and len(target.shape) == 2
    if not is_rows or len(rows_each) != len(part.entries):
        return None
    for entry, each in zip(part.entries, rows_each, strict=True):
        if each == 0:  # every row needs all of it
            continue
        is_all = entry.shape[:1] == (-(-target.shape[0] // each),)
        if not is_all or start % each or num % each:
            return None
    return _row_range(part, start, num, target.offset)


def _row_range(part: TensorSlice, start: int, num: int, offset: int) -> TensorSlice:
    """As `row_range`, for a part that can be cut so, and whose target begins at
    `offset`."""
    target = part.target
    first, *companions = (
        rows_of(entry, start // each, (start + num) // each) if each else entry
        for entry, each in zip(part.entries, part.codec.rows_each, strict=True)
    )
    columns = target.shape[1]
    made = View(offset + start * columns, (num, columns), target.stride)
    return _slice(part, first, View.whole(first.shape), made, tuple(companions))


def rows_of(entry: TensorEntry, start: int, end: int) -> TensorEntry:
    """The rows `start` ... `end` of a stored tensor, as one."""
    row = entry.nbytes // max(1, entry.shape[0])
    return TensorEntry(
        entry.name,
        entry.dtype,
        (end - start, *entry.shape[1:]),
        entry.path,
        entry.offset + start * row,
        (end - start) * row,
    )


def _slice(
    part: TensorSlice,
    entry: TensorEntry,
    source: View,
    target: View,
    companions: tuple[TensorEntry, ...],
) -> TensorSlice:
    """`part` with other places. It is written out since there are thousands."""
    codec, views = part.codec, part.companion_views
    return TensorSlice(entry, source, target, codec, companions, views)


def _one(view: View) -> View:
    """The first index of its first dimension."""
    return View(view.offset, view.shape[1:], view.stride[1:])


@lru_cache(maxsize=1 << 14)  # blocks share their views
def _rows(view: View, row: int) -> tuple[int, int]:
    """The first and the last row, of `row` elements, that have elements of `view`."""
    last = view.offset
    for size, step in zip(view.shape, view.stride, strict=True):
        last += (size - 1) * step
    return view.offset // row, max(view.offset, last) // row

"""Finds the stacked experts of a model, and cuts their recipes into pieces."""

import functools
import inspect
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from torch import nn

from ...io.checkpoint.header import TensorEntry
from ...io.codecs.cast import CAST
from ...io.weights.layout import TENSOR_ALIGNMENT
from ...io.weights.recipe import Recipe, TensorSlice, View
from .expert_probe import num_dense_experts
from .expert_stack import ExpertStack
from .sites import FoundUnit, ParameterRef

# The attributes that transformers' `use_experts_implementation` (>= 5.17, < 6) sets on
# a module. Its forward takes tokens, and for each token the chosen experts and their
# weights.
_OF_EXPERTS = frozenset({"config", "has_gate", "has_bias", "is_transposed"})
Way = Literal["in order", "sum", "batched"]
"""How the outputs of one token's experts become one: added in the order of experts, or
by a sum over the token's choices at the end. If "batched", by such a sum, too; and the
products of all (token, choice) pairs are one batch."""
_WAYS: Mapping[str | None, Way] = {"grouped_mm": "sum", "batched_mm": "batched"}
"""The way of transformers' implementations that are the same for all models."""
_IN_ORDER = "index_add_(0, token_idx,"
"""In the source of a forward that adds the outputs of one expert after the other."""


def is_experts(module: nn.Module) -> bool:
    """Whether `module` holds stacked experts, as transformers writes them."""
    has_gate = hasattr(type(module), "_apply_gate")
    return has_gate and set(vars(module)) >= _OF_EXPERTS


def way_of(module: nn.Module, kind: type) -> Way | None:
    """The way of the experts `module` of the class `kind`. None if it is not known."""
    config: Any = module.config
    name = getattr(config, "_experts_implementation", None)
    if name not in ("eager", None):
        return _WAYS.get(name)
    return "in order" if _adds_in_order(kind) else None


@functools.cache
def _adds_in_order(kind: Any) -> bool:
    forward = getattr(kind.forward, "__wrapped__", None)
    try:
        return forward is not None and _IN_ORDER in inspect.getsource(forward)
    except (OSError, TypeError):  # the source is not there
        return False


def find_stacks(
    model: nn.Module,
    places: Mapping[str, Sequence[ParameterRef]],
    recipes: Mapping[str, Recipe],
) -> dict[int, ExpertStack]:
    """The stacked experts of `model` that can be cut, by the id of their module."""
    used = {
        (id(where[0].module), where[0].key): name
        for name, where in places.items()
        if len(where) == 1
    }
    found = {}
    for name, module in model.named_modules():
        num = num_experts_of(module)
        if num is None:
            continue
        stack = _stack(name, module, num, used, recipes)
        if stack is not None:
            found[id(module)] = stack
    return found


def num_experts_of(module: nn.Module) -> int | None:
    """The number of experts that `module` holds, stacked so that a range of them can
    compute by itself. None if it is something else, or that is not known."""
    if not is_experts(module):
        return num_dense_experts(module)
    num = getattr(module, "num_experts", None)
    is_known = way_of(module, type(module)) is not None
    is_own = "forward" not in vars(module)
    is_parallel = getattr(module, "_is_expert_parallel", False)
    return num if is_known and is_own and not is_parallel else None


def _stack(
    name: str,
    module: nn.Module,
    num: int,
    used: Mapping[tuple[int, str], str],
    recipes: Mapping[str, Recipe],
) -> ExpertStack | None:
    keys = [key for key, value in module._parameters.items() if value is not None]
    tensors = {key: used.get((id(module), key), "") for key in keys}
    if num < 2 or not keys or "" in tensors.values():
        return None
    is_plain = all(not list(child.parameters()) for child in module.children())
    mine = [recipes[tensor] for tensor in tensors.values()]
    is_cut = all(r.shape[:1] == (num,) and _is_divisible(r) for r in mine)
    if not is_plain or not is_cut or not all(map(_keeps_residues, mine)):
        return None
    nbytes = sum(recipe.nbytes for recipe in mine)
    return ExpertStack(
        name, module, tensors, num, nbytes, is_dense=not is_experts(module)
    )


def cut(recipe: Recipe, bounds: Sequence[tuple[int, int]]) -> list[Recipe]:
    """The recipes of the ranges `bounds` (ascending, all together) of `recipe`, along
    its first dimension. It is divisible."""
    found: list[list[TensorSlice]] = [[] for _ in bounds]
    row = recipe.nbytes // recipe.dtype.itemsize // max(1, recipe.shape[0])
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


def _keeps_residues(recipe: Recipe) -> bool:
    """Whether an expert's matrix has one address modulo 64 bytes in a piece and in the
    whole. The bits of products depend on it."""
    expert_bytes = recipe.nbytes // max(1, recipe.shape[0])
    return len(recipe.shape) < 3 or expert_bytes % TENSOR_ALIGNMENT == 0


def _is_divisible(recipe: Recipe) -> bool:
    """Whether each of its rows can be made by itself, of its own bytes."""
    row = recipe.nbytes // recipe.dtype.itemsize // max(1, recipe.shape[0])
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


def _rows(view: View, row: int) -> tuple[int, int]:
    """The first and the last row, of `row` elements, that have elements of `view`."""
    last = view.offset
    for size, step in zip(view.shape, view.stride, strict=True):
        last += (size - 1) * step
    return view.offset // row, max(view.offset, last) // row

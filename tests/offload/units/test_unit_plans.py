"""Units that are alike share a plan: the one that each would get by itself."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from penstock.io.checkpoint.header import TensorEntry
from penstock.io.weights.layout import Layout, layout
from penstock.io.weights.recipe import Recipe, TensorSlice, View
from penstock.io.weights.stored_image import stored_image
from penstock.io.weights.transfer import Transfer, packed, same_layout
from penstock.offload.units.expert_cuts import cut
from penstock.offload.units.expert_stack import ExpertStack
from penstock.offload.units.sites import DividedStack, FoundUnit, ModelDivision
from penstock.offload.units.unit_plans import UnitPlans

BLOCKS, EXPERTS = 3, 6
PIECES = [(0, 2), (2, 4), (4, 6)]
SHAPE = (48, 40)
GAP = 8192
TRANSFERS: dict[str, Callable[[Layout], Transfer]] = {
    "in place": same_layout,
    "copied on": partial(packed, alignment=512, max_gap_bytes=GAP),
}


def experts(block: int, places: list[tuple[int, int]], dtype: torch.dtype) -> Recipe:
    """A stack of experts, each stored by itself; `places` are the file and the gap
    before each one, in bytes."""
    ends: dict[int, int] = {}
    slices = []
    for index, (file, gap) in enumerate(places):
        path, offset = Path(f"{block}-{file}.safetensors"), ends.get(file, 8) + gap
        numel = SHAPE[0] * SHAPE[1]
        ends[file] = offset + numel * dtype.itemsize
        name = f"{block}.{index}"
        entry = TensorEntry(name, dtype, SHAPE, path, offset, numel * dtype.itemsize)
        target = View(index * numel, SHAPE, (SHAPE[1], 1))
        slices.append(TensorSlice(entry, View.whole(SHAPE), target))
    return Recipe(f"{block}.experts.w", (EXPERTS, *SHAPE), torch.float32, tuple(slices))


def unit_plans(recipes: dict[str, Recipe], way: str) -> UnitPlans:
    in_place = 64 if way == "in place" else 1
    return UnitPlans(recipes, TRANSFERS[way], GAP, 4096, 512, in_place)


def stack_of(name: str, first: int) -> tuple[list[FoundUnit], DividedStack]:
    """The pieces of the stack `name`; the first is the unit `first`."""
    stack = ExpertStack(name, nn.Module(), {"w": f"{name}.w"}, EXPERTS, 1 << 20)
    units = [
        FoundUnit(f"{name}[{low}:{high}]", (f"{name}.w",), (0,), False, (low, high))
        for low, high in PIECES
    ]
    pieces = tuple(range(first, first + len(PIECES)))
    return units, DividedStack(stack, ((0, pieces),))


PLACES = st.tuples(st.integers(0, 1), st.sampled_from([0, 4, 4096, 20480, 102400]))


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.one_of(
            st.just([(0, 0)] * EXPERTS),
            st.lists(PLACES, min_size=EXPERTS, max_size=EXPERTS),
        ),
        min_size=BLOCKS,
        max_size=BLOCKS,
    ),
    st.sampled_from(sorted(TRANSFERS)),
    st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_a_plan_is_the_one_that_a_unit_would_get_by_itself(
    places: list[list[tuple[int, int]]], way: str, dtype: torch.dtype
) -> None:
    recipes = {
        recipe.name: recipe
        for block, of_block in enumerate(places)
        for recipe in [experts(block, of_block, dtype)]
    }
    units: list[FoundUnit] = []
    stacks = []
    for block in range(BLOCKS):
        pieces, stack = stack_of(f"{block}.experts", len(units))
        units += pieces
        stacks.append(stack)
    together = unit_plans(recipes, way)
    layouts, transfers = together.plans(ModelDivision((), tuple(units), tuple(stacks)))
    for unit, found, transfer in zip(units, layouts, transfers, strict=True):
        assert unit.experts is not None
        piece = PIECES.index(unit.experts)
        mine = [cut(recipes[unit.tensors[0]], PIECES)[piece]]
        own = layout(
            unit.name,
            mine,
            alignment=4096,
            memory_alignment=512,
            tensor_alignment=64 if way == "in place" else 1,
            max_gap_bytes=GAP,
        )
        assert found == own
        assert found.steps == own.steps
        assert transfer == TRANSFERS[way](own)
        kept = stored_image(unit.name, mine, transfer, alignment=4096, max_gap_bytes=0)
        image = together.image(unit)
        assert image.transfer == kept.transfer
        assert image.layout == kept.layout
        assert image.layout.steps == kept.layout.steps


def test_equal_blocks_are_planned_once() -> None:
    places = [(0, 0)] * EXPERTS
    made = (experts(block, places, torch.float32) for block in range(BLOCKS))
    recipes = {recipe.name: recipe for recipe in made}
    plans = unit_plans(recipes, "copied on")
    planned: list[str] = []
    transfer_of = plans.transfer_of

    def counted(layout: Layout) -> Transfer:
        planned.append(layout.name)
        return transfer_of(layout)

    object.__setattr__(plans, "transfer_of", counted)
    for block in range(BLOCKS):
        units, stack = stack_of(f"{block}.experts", 0)
        plans.plans(ModelDivision((), tuple(units), (stack,)))
    assert planned
    assert all(name.startswith("0.") for name in planned)

"""A packed slot holds all tensors' bytes, aligned, in as few copies as may be."""

from __future__ import annotations

import itertools

import torch
from hypothesis import given
from hypothesis import strategies as st

from penstock.io.weights.layout import Layout, Placed
from penstock.io.weights.steps import LoadSteps
from penstock.io.weights.transfer import Run, Transfer, packed, same_layout

DTYPES = (torch.uint8, torch.bfloat16, torch.float32, torch.float64)


def nbytes_of(tensor: Placed) -> int:
    return torch.Size(tensor.shape).numel() * tensor.dtype.itemsize


def layout_of(tensors: list[Placed]) -> Layout:
    end = max((t.offset + nbytes_of(t) for t in tensors), default=0)
    return Layout.of("unit", end + 7, LoadSteps(), tuple(tensors), end)


@st.composite
def layouts(draw: st.DrawFn) -> Layout:
    """Tensors anywhere, in any order: apart, side by side, inside of each other, and
    some of no bytes at all."""
    tensors = []
    position = 0
    for index in range(draw(st.integers(0, 8))):
        dtype = draw(st.sampled_from(DTYPES))
        shape = draw(st.sampled_from([(), (1,), (3, 5), (16,), (40,), (0,), (4, 0)]))
        back = draw(st.sampled_from([0, 0, 0, 8, 16, 21, 64]))
        gap = draw(st.sampled_from([0, 0, 1, 8, 16, 100]))
        offset = max(0, position - back) + gap
        placed = Placed(f"t{index}", offset, dtype, shape)
        position = max(position, offset + nbytes_of(placed))
        tensors.append(placed)
    return layout_of(draw(st.permutations(tensors)))


def copied(plan: Layout, transfer: Transfer) -> tuple[bytearray, bytes]:
    """The slot after all runs, and what they came from: no two bytes near alike."""
    source = bytes((7 * i + i // 251) % 251 + 1 for i in range(plan.nbytes))
    slot = bytearray(transfer.nbytes)
    for run in transfer.runs:
        taken = source[run.source_offset : run.source_offset + run.nbytes]
        assert len(taken) == run.nbytes, "a run reads beyond what was read"
        slot[run.target_offset : run.target_offset + run.nbytes] = taken
    assert len(slot) == transfer.nbytes, "a run writes beyond the slot"
    return slot, source


@given(layouts(), st.sampled_from([16, 64, 512]), st.sampled_from([0, 3, 16, 200]))
def test_every_tensor_lands_where_it_is_said_to_stand(
    plan: Layout, alignment: int, max_gap: int
) -> None:
    transfer = packed(plan, alignment=alignment, max_gap_bytes=max_gap)
    slot, source = copied(plan, transfer)
    assert [(t.name, t.dtype, t.shape) for t in transfer.tensors] == [
        (t.name, t.dtype, t.shape) for t in plan.tensors
    ]
    for before, after in zip(plan.tensors, transfer.tensors, strict=True):
        size = nbytes_of(before)
        assert after.offset % min(alignment, 256) == 0
        assert 0 <= after.offset <= after.offset + size <= transfer.nbytes
        found = slot[after.offset : after.offset + size]
        assert found == source[before.offset : before.offset + size], before.name


@given(layouts(), st.sampled_from([16, 64, 512]), st.sampled_from([0, 3, 16, 200]))
def test_runs_are_aligned_apart_in_order_and_as_few_as_the_rule_allows(
    plan: Layout, alignment: int, max_gap: int
) -> None:
    transfer = packed(plan, alignment=alignment, max_gap_bytes=max_gap)
    runs = transfer.runs
    assert all(run.nbytes > 0 for run in runs)
    assert all(run.target_offset % alignment == 0 for run in runs)
    for one, other in itertools.pairwise(runs):
        assert one.target_offset + one.nbytes <= other.target_offset
        assert other.target_offset - (one.target_offset + one.nbytes) < alignment
    end = runs[-1].target_offset + runs[-1].nbytes if runs else 1
    assert transfer.nbytes == -(-end // alignment) * alignment
    # Each run, told anew from the rule.
    real = sorted((t for t in plan.tensors if nbytes_of(t)), key=lambda t: t.offset)
    expected: list[list[int]] = []
    for tensor in real:
        start, end = tensor.offset, tensor.offset + nbytes_of(tensor)
        if (
            expected
            and (start - expected[-1][0]) % min(alignment, 256) == 0
            and start <= expected[-1][1] + max_gap
        ):
            expected[-1][1] = max(expected[-1][1], end)
        else:
            expected.append([start, end])
    assert [[r.source_offset, r.source_offset + r.nbytes] for r in runs] == expected


def test_a_gap_is_copied_along_up_to_the_limit_and_left_out_beyond() -> None:
    a = Placed("a", 5, torch.uint8, (16,))
    b = Placed("b", 53, torch.uint8, (16,))  # 32 bytes lie between them
    plan = layout_of([a, b])
    assert packed(plan, alignment=16, max_gap_bytes=32).runs == (Run(5, 0, 64),)
    assert packed(plan, alignment=16, max_gap_bytes=31).runs == (
        Run(5, 0, 16),
        Run(53, 16, 16),
    )


def test_a_tensor_that_the_run_would_misalign_begins_another() -> None:
    a = Placed("a", 0, torch.uint8, (8,))
    b = Placed("b", 8, torch.float32, (4,))
    transfer = packed(layout_of([a, b]), alignment=64, max_gap_bytes=1000)
    assert transfer.runs == (Run(0, 0, 8), Run(8, 64, 16))
    assert [t.offset for t in transfer.tensors] == [0, 64]


def test_a_tensor_inside_another_is_copied_with_it() -> None:
    whole = Placed("whole", 8, torch.float32, (32,))
    part = Placed("part", 40, torch.float32, (4,))
    transfer = packed(layout_of([part, whole]), alignment=16, max_gap_bytes=0)
    assert transfer.runs == (Run(8, 0, 128),)
    assert {t.name: t.offset for t in transfer.tensors} == {"whole": 0, "part": 32}


def test_a_unit_of_no_bytes_has_no_run_but_a_slot() -> None:
    empty = Placed("empty", 77, torch.float32, (0, 3))
    for tensors in ([], [empty]):
        transfer = packed(layout_of(tensors), alignment=64, max_gap_bytes=9)
        assert transfer.runs == ()
        assert transfer.nbytes == 64
        assert all(t.offset == 0 for t in transfer.tensors)


@given(layouts())
def test_as_it_lies_nothing_moves(plan: Layout) -> None:
    transfer = same_layout(plan)
    slot, source = copied(plan, transfer)
    assert slot == source
    assert transfer.tensors == plan.tensors
    assert (transfer.name, transfer.nbytes) == (plan.name, plan.nbytes)

"""Stacked experts are cut into pieces: sizes, and where the bytes of each are."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from penstock.io.checkpoint.header import TensorEntry
from penstock.io.weights.layout import layout
from penstock.io.weights.recipe import Recipe, TensorSlice, View, plain
from penstock.offload.units.expert_cuts import cut, rows_of
from penstock.offload.units.expert_stack import (
    LARGE_BYTES,
    ExpertStack,
    piece_of,
    pieces_of,
)

FILE = Path("model.safetensors")


@given(st.integers(2, 400), st.integers(1, 1 << 28), st.integers(-(1 << 20), 1 << 36))
def test_pieces_cover_all_experts_and_windows_have_room(
    num: int, expert_bytes: int, window_bytes: int
) -> None:
    stack = ExpertStack("experts", nn.Module(), {}, num, num * expert_bytes)
    windows = pieces_of(stack, window_bytes)
    pieces = [piece for window in windows for piece in window]
    assert [n for low, high in pieces for n in range(low, high)] == list(range(num))
    for window in windows:
        nbytes = (window[-1][1] - window[0][0]) * expert_bytes
        assert nbytes <= window_bytes or len(window) == 1
    step = piece_of(num, expert_bytes, window_bytes)
    assert step == 1 or step * expert_bytes <= LARGE_BYTES


def test_a_piece_is_as_large_as_is_good_for_reading() -> None:
    mib = 1 << 20
    assert piece_of(128, 13 * mib, 8 << 30) == 1, "one expert is more than enough"
    assert piece_of(64, mib // 2, 8 << 30) == 8
    assert piece_of(64, mib // 2, 32 * mib) == 2, "a thirty-second of the window"
    assert piece_of(64, mib // 2, 0) == 1


def entry(shape: tuple[int, ...], offset: int = 512) -> TensorEntry:
    nbytes = 4 * torch.Size(shape).numel()
    return TensorEntry("stored", torch.float32, shape, FILE, offset, nbytes)


def filled(recipes: list[Recipe], stored: torch.Tensor) -> torch.Tensor:
    """What the recipes make of one stored tensor, put together."""
    made = []
    for recipe in recipes:
        target = torch.zeros(recipe.shape).reshape(-1)
        for part in recipe.slices:
            start = (part.entry.offset - 512) // 4
            source = stored.reshape(-1)[start : start + part.entry.nbytes // 4]
            part.target.on(target).copy_(part.source.on(source))
        made.append(target.reshape(recipe.shape))
    return torch.cat(made)


BOUNDS = [(0, 2), (2, 3), (3, 6)]


def test_a_stored_stack_is_cut_into_ranges_of_the_file() -> None:
    whole = entry((6, 3, 2))
    pieces = cut(plain(whole, name="w", dtype=torch.float32), BOUNDS)
    assert [piece.shape for piece in pieces] == [(2, 3, 2), (1, 3, 2), (3, 3, 2)]
    found = [piece.direct for piece in pieces]
    assert [(f.offset, f.nbytes) for f in found if f is not None] == [
        (512, 48),
        (560, 24),
        (584, 72),
    ]


@pytest.mark.parametrize("is_transposed", [False, True])
def test_pieces_have_the_values_of_the_whole(is_transposed: bool) -> None:
    stored = torch.arange(36.0).reshape(6, 3, 2)
    shape = (6, 2, 3) if is_transposed else (6, 3, 2)
    target = View(0, (6, 3, 2), (6, 1, 3)) if is_transposed else View.whole(shape)
    part = TensorSlice(entry((6, 3, 2)), View.whole((6, 3, 2)), target)
    recipe = Recipe("w", shape, torch.float32, (part,))
    expected = filled([recipe], stored)
    assert torch.equal(filled(cut(recipe, BOUNDS), stored), expected)


def test_experts_that_are_stored_one_by_one_keep_their_own_files() -> None:
    parts = tuple(
        TensorSlice(
            entry((3, 2), 512 + 24 * index),
            View.whole((3, 2)),
            View(6 * index, (3, 2), (2, 1)),
        )
        for index in range(6)
    )
    recipe = Recipe("w", (6, 3, 2), torch.float32, parts)
    stored = torch.arange(36.0)
    pieces = cut(recipe, BOUNDS)
    assert [len(piece.slices) for piece in pieces] == [2, 1, 3]
    assert torch.equal(filled(pieces, stored).reshape(-1), stored)


def test_an_expert_lies_where_it_does_in_the_whole_stack() -> None:
    """At a multiple of 64 bytes, if the stack is assembled; else as in its file."""
    part = TensorSlice(entry((4, 16), 520), View.whole((4, 16)), View.whole((4, 16)))
    other = replace(part, target=View(64, (4, 16), (16, 1)))
    one_by_one = Recipe("w", (2, 4, 16), torch.float32, (part, other))
    stacked = plain(entry((2, 4, 16), 520), name="w", dtype=torch.float32)
    residues = []
    for recipe in (one_by_one, stacked):
        plan = layout(
            "unit",
            cut(recipe, [(0, 1), (1, 2)])[:1],
            alignment=4096,
            memory_alignment=1,
            tensor_alignment=64,
            max_gap_bytes=0,
        )
        residues.append(plan.tensors[0].offset % 64)
    assert residues == [0, 8]


def test_rows_of_an_entry_are_its_bytes() -> None:
    found = rows_of(entry((6, 3, 2)), 2, 5)
    assert (found.shape, found.offset, found.nbytes) == ((3, 3, 2), 560, 72)

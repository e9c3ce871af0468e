"""A unit whose tensors lie in another file stays where it is in its slot."""

from __future__ import annotations

from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from penstock.io.checkpoint.index import open_files
from penstock.io.extent import align_down, align_up
from penstock.io.fallbacks import Fallbacks
from penstock.io.memory.arena import Arena
from penstock.io.readers.threads import ThreadReader
from penstock.io.weights.layered import LayeredReader
from penstock.io.weights.layout import TENSOR_ALIGNMENT, Layout, layout
from penstock.io.weights.loader import Loader
from penstock.io.weights.overlay import overlaid
from penstock.io.weights.recipe import Recipe, TensorSlice, View, plain

PAGE = 4096
SHAPES = {"a": (3,), "b": (1500,), "c": (7,), "d": (5000,), "e": (0,), "f": (2, 900)}
LARGE = 40_000
"""Elements of each part of the stacks below: forty pages."""


def test_every_choice_of_tensors_is_loaded_from_where_it_lies(
    tmp_path: Path, no_leaks: None
) -> None:
    old = {n: torch.rand(shape) for n, shape in SHAPES.items()}
    new = {n: -torch.rand(shape) for n, shape in SHAPES.items()}
    save_file(old, tmp_path / "old.safetensors")
    save_file(new, tmp_path / "new.safetensors")
    below = open_files(tmp_path, ["old.safetensors"])
    above = open_files(tmp_path, ["new.safetensors"])
    recipes = [plain(e, name=n, dtype=e.dtype) for n, e in below.entries.items()]
    plan = layout(
        "unit",
        recipes,
        alignment=PAGE,
        memory_alignment=PAGE,
        tensor_alignment=TENSOR_ALIGNMENT,
        max_gap_bytes=PAGE,
    )
    kinds: dict[str, Any] = {"num_threads": 2, "direct": False, "chunk_bytes": 2 * PAGE}
    path = tmp_path / "new.safetensors"
    with (
        ThreadReader(below.stamps, **kinds, fallbacks=Fallbacks()) as main,
        LayeredReader(main) as reader,
        Arena(plan.nbytes) as arena,
    ):
        reader.add(path, ThreadReader(above.stamps, **kinds, fallbacks=Fallbacks()))
        for count in range(len(SHAPES) + 1):
            for names in combinations(SHAPES, count):
                changed = overlaid(
                    plan, {n: above.entries[n] for n in names}, alignment=PAGE
                )
                check_reads(changed)
                assert (changed.tensors, changed.nbytes) == (plan.tensors, plan.nbytes)
                loader = Loader([changed], arena, reader, bounce_bytes=PAGE)
                loader.load(0, 0).wait()
                loader.close()
                for name in SHAPES:
                    expected = new if name in names else old
                    assert torch.equal(tensor(arena, plan, name), expected[name])
        assert reader.bytes_read_above > 0
        reader.remove(path)


@pytest.mark.parametrize("tensor_alignment", [TENSOR_ALIGNMENT, 1])
def test_stacks_of_several_files_are_replaced_one_or_both_or_none(
    tensor_alignment: int, tmp_path: Path, no_leaks: None
) -> None:
    """On a CPU their parts are moved together, for a GPU they lie apart."""
    parts = {f"{n}.{i}": torch.rand(LARGE) for n in "st" for i in range(3)}
    others = {"x": torch.rand(30), "y": torch.rand(2000)}
    for i in range(3):
        here = {key: part for key, part in parts.items() if key[-1] == str(i)}
        more = others if i == 1 else {f"{i}": torch.zeros(8 + i, dtype=torch.uint8)}
        save_file({**here, **more}, tmp_path / f"{i}.safetensors")
    old = {n: torch.stack([parts[f"{n}.{i}"] for i in range(3)]) for n in "st"} | others
    new = {name: -tensor for name, tensor in old.items()}
    save_file(new, tmp_path / "new.safetensors")
    below = open_files(tmp_path, [f"{i}.safetensors" for i in range(3)])
    above = open_files(tmp_path, ["new.safetensors"])
    recipes = [
        plain(below.entries[name], name=name, dtype=torch.float32) for name in others
    ]
    whole = View.whole((LARGE,))
    for name in "st":
        slices = tuple(
            TensorSlice(
                below.entries[f"{name}.{i}"], whole, View(i * LARGE, (LARGE,), (1,))
            )
            for i in range(3)
        )
        recipes.insert(1, Recipe(name, (3, LARGE), torch.float32, slices))
    plan = layout(
        "unit",
        recipes,
        alignment=PAGE,
        memory_alignment=512,
        tensor_alignment=tensor_alignment,
        max_gap_bytes=0,
    )
    assert len(plan.chains) == (2 if tensor_alignment > 1 else 0)
    kinds: dict[str, Any] = {"num_threads": 2, "direct": False, "chunk_bytes": 2 * PAGE}
    with (
        ThreadReader(below.stamps, **kinds, fallbacks=Fallbacks()) as main,
        LayeredReader(main) as reader,
        Arena(plan.nbytes) as arena,
    ):
        path = tmp_path / "new.safetensors"
        reader.add(path, ThreadReader(above.stamps, **kinds, fallbacks=Fallbacks()))
        for count in range(len(old) + 1):
            for names in combinations(old, count):
                changed = overlaid(
                    plan, {n: above.entries[n] for n in names}, alignment=PAGE
                )
                loader = Loader([changed], arena, reader, bounce_bytes=PAGE)
                loader.load(0, 0).wait()
                loader.close()
                for name in old:
                    expected = new if name in names else old
                    assert torch.equal(tensor(arena, plan, name), expected[name])
        reader.remove(path)


def check_reads(plan: Layout) -> None:
    for read in plan.reads:
        extent = read.extent
        assert extent.offset == align_down(extent.offset, PAGE)
        assert extent.nbytes == align_up(extent.nbytes, PAGE)
        assert read.slot_offset % PAGE == 0


def tensor(arena: Arena, plan: Layout, name: str) -> torch.Tensor:
    placed = next(tensor for tensor in plan.tensors if tensor.name == name)
    numel = torch.Size(placed.shape).numel()
    if not numel:
        return torch.empty(placed.shape)
    ranges = [(part.offset, part.nbytes) for part in placed.fragments]
    ranges = ranges or [(placed.offset, numel * placed.dtype.itemsize)]
    found = torch.cat([arena.tensor(*each) for each in ranges])
    return found.view(placed.dtype).view(placed.shape).clone()

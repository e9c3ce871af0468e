"""A unit whose tensors lie in another file stays where it is in its slot."""

from __future__ import annotations

from itertools import combinations
from pathlib import Path
from typing import Any

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
from penstock.io.weights.recipe import plain

PAGE = 4096
SHAPES = {"a": (3,), "b": (1500,), "c": (7,), "d": (5000,), "e": (0,), "f": (2, 900)}


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
    found = arena.tensor(placed.offset, numel * placed.dtype.itemsize)
    return found.view(placed.dtype).view(placed.shape).clone()

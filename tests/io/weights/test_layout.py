"""A layout, executed by hand, makes every parameter and touches nothing else."""

from __future__ import annotations

import itertools
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import penstock.io.weights.layout as layout_file
from checkpoints import random_tensor, same_bits
from penstock.io.checkpoint.index import open_files
from penstock.io.codecs.tiles import TILES
from penstock.io.extent import Extent
from penstock.io.weights.layout import TENSOR_ALIGNMENT, Layout, Placed, layout
from penstock.io.weights.recipe import Recipe, TensorSlice, View, plain
from penstock.io.weights.steps import Move, Read
from recipes import Example, examples, make, write_packed

ALIGNMENTS = st.sampled_from([64, 512, 4096])
UNTOUCHED = 0xA5


class Slot:
    """A slot that counts how often each of its bytes is written."""

    def __init__(self, nbytes: int) -> None:
        self.content = torch.full((nbytes,), UNTOUCHED, dtype=torch.uint8)
        self.writes = torch.zeros(nbytes, dtype=torch.int32)
        self.by_reads = torch.zeros(nbytes, dtype=torch.int32)

    def run(self, plan: Layout) -> None:
        """Does what `plan` says, one byte range after the other.

        Reads whose bytes are moved come as late as they may, each just before its move.
        """
        first = min((c.first_read for c in plan.chains), default=len(plan.reads))
        for read in plan.reads[:first]:
            self._read(read, plan.nbytes)
        for chain in plan.chains:
            for index, move in enumerate(chain.moves, chain.first_read):
                self._read(plan.reads[index], plan.nbytes)
                self._move(move, plan.reads[index])
        for copy in plan.decodes:
            stored = []
            for each in copy.inputs:
                data = stored_bytes(each.extent)
                assert len(data) == each.extent.nbytes
                stored.append(each.view.on(data.clone().view(each.dtype)))
            size = copy.target_numel * copy.target_dtype.itemsize
            start = copy.target_offset
            assert start + size <= plan.nbytes
            target = self.content[start : start + size].clone().view(copy.target_dtype)
            copy.codec.decode(stored, copy.target.on(target), TILES)
            touched = torch.zeros(copy.target_numel, dtype=torch.int32)
            copy.target.on(touched).add_(1)
            self.content[start : start + size] = target.view(torch.uint8)
            self.writes[start : start + size] += touched.repeat_interleave(
                copy.target_dtype.itemsize
            )

    def _read(self, read: Read, nbytes: int) -> None:
        data = stored_bytes(read.extent)
        self._write(read.slot_offset, data)
        # What lies past the end of the file is read into, too, by a direct read.
        end = read.slot_offset + read.extent.nbytes
        self.by_reads[read.slot_offset : end] += 1
        assert end <= nbytes

    def _move(self, move: Move, read: Read) -> None:
        """Afterwards the rest of the window may be written again."""
        source = slice(move.source_offset, move.source_offset + move.nbytes)
        target = slice(move.target_offset, move.target_offset + move.nbytes)
        window = slice(read.slot_offset, read.slot_offset + read.extent.nbytes)
        assert torch.all(self.writes[source] == 1)
        moved = self.content[source].clone()
        for of_bytes in (self.writes, self.by_reads):
            of_bytes[window] = 0
            of_bytes[target] += 1
        self.content[target] = moved

    def tensor(self, placed: Placed) -> torch.Tensor:
        content = torch.cat([self.content[a:b] for a, b in ranges_of(placed)])
        return content.view(placed.dtype).view(placed.shape)

    def _write(self, offset: int, data: torch.Tensor) -> None:
        self.content[offset : offset + len(data)] = data
        self.writes[offset : offset + len(data)] += 1


def stored_bytes(extent: Extent) -> torch.Tensor:
    data = extent.path.read_bytes()[extent.offset : extent.end]
    return torch.tensor(list(data), dtype=torch.uint8)


def nbytes_of(placed: Placed) -> int:
    return torch.Size(placed.shape).numel() * placed.dtype.itemsize


def ranges_of(placed: Placed) -> list[tuple[int, int]]:
    """Start and end of the byte ranges where a parameter lies, in its order."""
    if placed.fragments:
        starts = [part.start for part in placed.fragments]
        sizes = [part.nbytes for part in placed.fragments]
        assert starts == [0, *itertools.accumulate(sizes)][:-1]
        return [(part.offset, part.offset + part.nbytes) for part in placed.fragments]
    return [(placed.offset, placed.offset + nbytes_of(placed))]


def lay_out(
    recipes: Iterable[Recipe],
    *,
    alignment: int = 4096,
    memory_alignment: int | None = None,
    tensor_alignment: int = TENSOR_ALIGNMENT,
    max_gap_bytes: int = 0,
) -> Layout:
    return layout(
        "unit",
        recipes,
        alignment=alignment,
        memory_alignment=min(memory_alignment or alignment, alignment),
        tensor_alignment=tensor_alignment,
        max_gap_bytes=max_gap_bytes,
    )


@contextmanager
def few_blocks(number: int) -> Iterator[None]:
    """Byte ranges of so many blocks are large."""
    before, layout_file.MIN_BLOCKS = layout_file.MIN_BLOCKS, number
    yield
    layout_file.MIN_BLOCKS = before


def check_aligned(plan: Layout, alignment: int, memory_alignment: int) -> None:
    assert plan.nbytes % alignment == 0
    assert plan.nbytes > 0
    for read in plan.reads:
        assert read.extent.offset % alignment == 0
        assert read.extent.nbytes % alignment == 0
        assert read.slot_offset % memory_alignment == 0
        assert read.extent.nbytes > 0
    for placed in plan.tensors:
        if not placed.fragments:
            assert placed.offset % placed.dtype.itemsize == 0
        assert all(end <= plan.nbytes for _, end in ranges_of(placed))
    for chain in plan.chains:
        windows = plan.reads[chain.first_read :][: len(chain.moves)]
        for move, later in zip(chain.moves, windows[1:], strict=False):
            assert move.target_offset + move.nbytes <= later.slot_offset
        for one, other in itertools.pairwise(windows):
            assert one.slot_offset + one.extent.nbytes <= other.slot_offset


def check_lies_like_the_resident(
    recipes: Iterable[Recipe], plan: Layout, tensor_alignment: int
) -> None:
    """Modulo 64 bytes: what is used as stored as in the file, what is made at 0."""
    for recipe, placed in zip(recipes, plan.tensors, strict=True):
        extent = recipe.direct
        if not recipe.nbytes:
            continue
        if placed.fragments:
            assert tensor_alignment == 1
        elif extent is not None and extent.offset % recipe.dtype.itemsize == 0:
            assert placed.offset % TENSOR_ALIGNMENT == extent.offset % TENSOR_ALIGNMENT
        else:
            assert placed.offset % tensor_alignment == 0


@pytest.mark.slow
@given(
    example=examples(),
    alignment=ALIGNMENTS,
    memory_alignment=st.sampled_from([1, 4, 512, 4096]),
    tensor_alignment=st.sampled_from([1, TENSOR_ALIGNMENT]),
    max_gap_bytes=st.sampled_from([0, 64, 4096, 1 << 20]),
    min_blocks=st.sampled_from([0, 1]),
)
def test_every_byte_of_every_parameter_is_written_once_and_is_right(
    example: Example,
    alignment: int,
    memory_alignment: int,
    tensor_alignment: int,
    max_gap_bytes: int,
    min_blocks: int,
) -> None:
    memory_alignment = min(memory_alignment, alignment)
    with tempfile.TemporaryDirectory() as folder, few_blocks(min_blocks):
        made = make(example, Path(folder))
        plan = lay_out(
            made.recipes,
            alignment=alignment,
            memory_alignment=memory_alignment,
            tensor_alignment=tensor_alignment,
            max_gap_bytes=max_gap_bytes,
        )
        check_aligned(plan, alignment, memory_alignment)
        check_lies_like_the_resident(made.recipes, plan, tensor_alignment)
        slot = Slot(plan.nbytes)
        slot.run(plan)
    assert [p.name for p in plan.tensors] == [r.name for r in made.recipes]
    assert int(slot.writes.max()) <= 1, "two writers of one byte would be a race"
    # Not even where a read ends behind its file does anybody else write.
    assert int((slot.by_reads + (slot.writes > slot.by_reads)).max()) <= 1
    for placed in plan.tensors:
        for start, end in ranges_of(placed):
            assert torch.all(slot.writes[start:end] == 1)
        wanted = made.wanted[placed.name]
        assert (placed.dtype, placed.shape) == (wanted.dtype, tuple(wanted.shape))
        assert same_bits(slot.tensor(placed), wanted)


@settings(max_examples=10)
@given(example=examples(), alignment=ALIGNMENTS)
def test_stored_bytes_count_what_parameters_are_made_of(
    example: Example, alignment: int
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        made = make(example, Path(folder))
        plan = lay_out(made.recipes, alignment=alignment)
    least = sum(
        sum(p.source.numel * p.entry.dtype.itemsize for p in r.slices)
        for r in made.recipes
    )
    most = sum(
        parameter.parts * parameter.rows * parameter.columns * parameter.stored.itemsize
        for parameter in example.parameters
    )
    assert least <= plan.stored_bytes <= most


def files_of(folder: Path, *tensors: torch.Tensor) -> dict[str, Recipe]:
    """One file of `tensors`, side by side, and a plain recipe of each."""
    path = folder / "x.safetensors"
    write_packed(path, {str(i): tensor for i, tensor in enumerate(tensors)})
    entries = open_files(folder, [path.name]).entries
    return {n: plain(e, name=n, dtype=e.dtype) for n, e in entries.items()}


def test_neighbours_are_one_read_and_no_copy(tmp_path: Path) -> None:
    recipes = files_of(
        tmp_path, *(random_tensor(torch.uint8, (n,)) for n in (5000, 1, 0, 77))
    )
    plan = lay_out(recipes.values())
    assert len(plan.reads) == 1
    assert plan.decodes == ()
    assert plan.stored_bytes == 5078
    assert plan.nbytes == 8192


def test_a_gap_that_is_too_wide_takes_no_room(tmp_path: Path) -> None:
    recipes = files_of(
        tmp_path, *(random_tensor(torch.uint8, (n,)) for n in (100, 100_000, 100))
    )
    wanted = [recipes["0"], recipes["2"]]
    wide = lay_out(wanted, max_gap_bytes=1 << 20)
    narrow = lay_out(wanted, max_gap_bytes=4096)
    assert (len(wide.reads), len(narrow.reads)) == (1, 2)
    assert narrow.nbytes == 8192 < wide.nbytes


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.int64])
def test_a_tensor_at_an_odd_offset_is_moved_to_an_even_one(
    dtype: torch.dtype, tmp_path: Path
) -> None:
    for lead in range(9):  # one of two neighbouring leads makes the offset odd
        folder = tmp_path / str(lead)
        folder.mkdir()
        recipes = files_of(
            folder,
            random_tensor(torch.uint8, (lead,)),
            random_tensor(dtype, (3000,), seed=lead),
        )
        recipe = recipes["1"]
        plan = lay_out([recipe])
        is_odd = recipe.slices[0].entry.offset % dtype.itemsize != 0
        assert bool(plan.decodes) == is_odd
        assert bool(plan.reads) != is_odd
        check_aligned(plan, 4096, 4096)


def experts(
    folder: Path, rows: int, order: tuple[int, ...], *, data_start: int
) -> tuple[Recipe, torch.Tensor]:
    """Tensors of `rows` KiB, side by side in the file, stacked in another order."""
    stored = [random_tensor(torch.bfloat16, (rows, 512), seed=i) for i in order]
    path = folder / "x.safetensors"
    named = {str(i): tensor for i, tensor in enumerate(stored)}
    write_packed(path, named, data_start=data_start)
    entries = open_files(folder, [path.name]).entries
    shape = (len(order), rows, 512)
    target = torch.empty(shape, device="meta")
    pieces = [
        TensorSlice(entries[str(i)], View.whole((rows, 512)), View.of(target[expert]))
        for i, expert in enumerate(order)
    ]
    wanted = torch.stack([stored[order.index(i)] for i in range(len(order))])
    return Recipe("experts", shape, torch.bfloat16, tuple(pieces)), wanted


def run(recipe: Recipe, memory_alignment: int = 4096) -> tuple[int, int, torch.Tensor]:
    """Bytes that are copied, bytes that are moved then, and the parameter."""
    plan = lay_out([recipe], memory_alignment=memory_alignment)
    check_aligned(plan, 4096, memory_alignment)
    slot = Slot(plan.nbytes)
    slot.run(plan)
    copied = sum(each.stored_bytes for each in plan.decodes)
    moved = sum(move.nbytes for chain in plan.chains for move in chain.moves)
    return copied, moved, slot.tensor(plan.tensors[0])


@pytest.mark.parametrize("data_start", [4096, 4104, 8190])
@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1)])
@pytest.mark.parametrize("rows", [128, 129])
def test_experts_are_read_in_place_or_moved_but_never_copied(
    rows: int, order: tuple[int, ...], data_start: int, tmp_path: Path
) -> None:
    recipe, wanted = experts(tmp_path, rows, order, data_start=data_start)
    copied, moved, made = run(recipe)
    assert same_bits(made, wanted)
    is_in_place = data_start == 4096 and (rows == 128 or order == (0, 1, 2))
    assert copied <= (0 if not is_in_place else 3 * 4096)
    assert moved == (0 if is_in_place else recipe.nbytes)


@pytest.mark.parametrize("memory_alignment", [1, 4])
def test_experts_are_not_moved_where_reads_may_land_anywhere(
    memory_alignment: int, tmp_path: Path
) -> None:
    recipe, wanted = experts(tmp_path, 128, (2, 0, 1), data_start=4104)
    copied, moved, made = run(recipe, memory_alignment)
    assert same_bits(made, wanted)
    assert (copied, moved) == (3 * 4096, 0)


def test_small_experts_are_copied_rather_than_moved(tmp_path: Path) -> None:
    recipe, wanted = experts(tmp_path, 33, (2, 0, 1), data_start=4104)
    copied, moved, made = run(recipe)
    assert same_bits(made, wanted)
    assert (copied, moved) == (recipe.nbytes, 0)


def across(folder: Path, files: tuple[int, ...]) -> tuple[Recipe, torch.Tensor]:
    """Experts of 128 KiB, the i-th of them in the file `files[i]`. No two files begin
    their data at offsets that agree modulo 512."""
    stored = [random_tensor(torch.bfloat16, (128, 512), seed=i) for i in range(8)]
    names = []
    for file in sorted(set(files)):
        names.append(f"{file}.safetensors")
        here = {str(i): stored[i] for i, other in enumerate(files) if other == file}
        write_packed(folder / names[-1], here, data_start=4104 + 8 * file)
    entries = open_files(folder, names).entries
    whole = View.whole((128, 512))
    parts = [
        TensorSlice(entries[str(i)], whole, View(i * 65536, (128, 512), (512, 1)))
        for i in range(8)
    ]
    shape = (8, 128, 512)
    return Recipe("experts", shape, torch.bfloat16, tuple(parts)), torch.stack(stored)


FILES = [(0,) * 8, (0, 0, 0, 0, 0, 1, 1, 1), (3, 1, 3, 0, 2, 0, 1, 3)]


@pytest.mark.parametrize("files", FILES)
def test_experts_across_files_in_any_order_are_not_copied(
    files: tuple[int, ...], tmp_path: Path
) -> None:
    recipe, wanted = across(tmp_path, files)
    copied, moved, made = run(recipe, 512)
    assert same_bits(made, wanted)
    assert (copied, moved) == (0, recipe.nbytes)


@pytest.mark.parametrize("files", FILES)
def test_experts_that_are_copied_on_are_neither_copied_nor_moved(
    files: tuple[int, ...], tmp_path: Path
) -> None:
    recipe, wanted = across(tmp_path, files)
    plan = lay_out([recipe], memory_alignment=512, tensor_alignment=1)
    assert not plan.decodes
    assert not plan.chains
    slot = Slot(plan.nbytes)
    slot.run(plan)
    assert same_bits(slot.tensor(plan.tensors[0]), wanted)
    read = sum(each.extent.nbytes for each in plan.reads)
    assert read <= recipe.nbytes + 2 * 4096 * len(plan.reads)


def test_steps_are_worked_out_when_they_are_needed(tmp_path: Path) -> None:
    recipe, _ = across(tmp_path, FILES[0])
    plan = lay_out([recipe])
    assert "steps" not in vars(plan)
    assert plan.reads is plan.reads
    assert "steps" in vars(plan)


def test_a_parameter_at_an_odd_offset_is_right(tmp_path: Path) -> None:
    recipe, wanted = experts(tmp_path, 32, (0, 1), data_start=4097)
    copied, moved, made = run(recipe)
    assert same_bits(made, wanted)
    assert (copied, moved) == (recipe.nbytes, 0)


def test_two_parameters_may_be_the_same_stored_tensor(tmp_path: Path) -> None:
    recipes = files_of(tmp_path, random_tensor(torch.float32, (10, 10)))
    stored = recipes["0"]
    other = Recipe("other", stored.shape, stored.dtype, stored.slices)
    plan = lay_out([stored, other])
    slot = Slot(plan.nbytes)
    slot.run(plan)
    assert plan.tensors[0].offset == plan.tensors[1].offset
    assert same_bits(slot.tensor(plan.tensors[0]), slot.tensor(plan.tensors[1]))


def test_a_unit_of_empty_tensors_has_a_slot_and_no_reads(tmp_path: Path) -> None:
    recipes = files_of(tmp_path, random_tensor(torch.float32, (0, 3)))
    plan = lay_out(recipes.values())
    assert not plan.reads
    assert not plan.decodes
    assert plan.tensors == (Placed("0", 0, torch.float32, (0, 3)),)
    assert plan.nbytes == 4096

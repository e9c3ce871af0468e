"""Where each byte of a unit lands in its slot. Pure: the I/O plan, not the I/O.

Parameters that are one byte range of a file keep their place relative to the aligned
window they are read with, so O_DIRECT reads go straight into the slot and parameters
are views of it. Everything else is assembled behind the windows: interior blocks of a
stacked piece are read in place where file and slot are congruent, the rest is copied.

On a CPU the last bits of a matrix product depend on the address of the weight, modulo
the width of a vector register. So a parameter lies, modulo 64 bytes, where it would lie
in the resident model: transformers maps a file into memory and leaves a tensor that is
used as stored where it is, at its offset in the file; whatever it makes (a stack of
experts, a cast) comes from torch's allocator, at a multiple of 64.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import torch

from ..extent import Extent, align_down, align_up, windows
from .recipe import Recipe, TensorSlice, View

TENSOR_ALIGNMENT = 64
"""Bytes. What torch's allocator aligns to (c10::gAlignment), and the widest vector."""


@dataclass(frozen=True, slots=True)
class Read:
    """An aligned window of a file, read straight into the slot."""

    extent: Extent
    slot_offset: int


@dataclass(frozen=True, slots=True)
class Copy:
    """Bytes that go through a bounce buffer: a cast, a strided part, an edge block."""

    extent: Extent
    dtype: torch.dtype
    source: View
    """Of the elements in `extent`."""
    target_offset: int
    """Of the target tensor in the slot, in bytes."""
    target_dtype: torch.dtype
    target_numel: int
    target: View


@dataclass(frozen=True, slots=True)
class Conversion:
    """A parameter made by a function of whole stored tensors."""

    recipe: Recipe
    target_offset: int


@dataclass(frozen=True, slots=True)
class Move:
    """Bytes of the slot that could not be read to where they belong: the last step."""

    source_offset: int
    target_offset: int
    """Less than 64 bytes before `source_offset`: the two ranges overlap."""
    nbytes: int


@dataclass(frozen=True, slots=True)
class Placed:
    """A finished parameter inside the slot."""

    name: str
    offset: int
    dtype: torch.dtype
    shape: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Layout:
    """The whole plan of loading one unit into a slot of `nbytes`."""

    name: str
    nbytes: int
    reads: tuple[Read, ...]
    copies: tuple[Copy, ...]
    conversions: tuple[Conversion, ...]
    moves: tuple[Move, ...]
    """After all of the above, in any order."""
    tensors: tuple[Placed, ...]
    stored_bytes: int
    """Bytes of the checkpoint that make this unit, each counted once."""


def layout(
    name: str,
    recipes: Iterable[Recipe],
    *,
    alignment: int,
    memory_alignment: int,
    tensor_alignment: int,
    max_gap_bytes: int,
) -> Layout:
    """Lays out the unit `name`, made of `recipes`, in a slot that starts at a multiple
    of `alignment`.

    Extents of reads are aligned to `alignment` bytes, the addresses they are read to
    only to `memory_alignment`, which divides it: 1 for reads through the page cache.
    Assembled parameters lie at multiples of `tensor_alignment`: 64 where they are used
    in place, 1 where each of them is copied on.
    """
    recipes = list(recipes)
    direct = {r.name: extent for r in recipes if (extent := _in_place(r)) is not None}
    reads: list[Read] = []
    position = 0
    for window in windows(
        direct.values(), alignment=alignment, max_gap_bytes=max_gap_bytes
    ):
        reads.append(Read(window, position))
        position += window.nbytes
    placed = {
        r.name: Placed(r.name, _slot_offset(direct[r.name], reads), r.dtype, r.shape)
        for r in recipes
        if r.name in direct
    }
    copies: list[Copy] = []
    conversions: list[Conversion] = []
    moves: list[Move] = []
    for recipe in recipes:
        if recipe.name in direct:
            continue
        base = _congruent(position, recipe, memory_alignment)
        final = align_down(base, tensor_alignment)
        if final != base and recipe.nbytes:
            moves.append(Move(base, final, recipe.nbytes))
        position = align_up(base + recipe.nbytes, alignment)
        placed[recipe.name] = Placed(recipe.name, final, recipe.dtype, recipe.shape)
        if recipe.convert is not None:
            conversions.append(Conversion(recipe, base))
        for piece in recipe.pieces:
            more_reads, more_copies = _assemble(
                recipe, piece, base, alignment, memory_alignment
            )
            reads += more_reads
            copies += more_copies
    return Layout(
        name,
        max(align_up(position, alignment), alignment),
        tuple(reads),
        tuple(copies),
        tuple(conversions),
        tuple(moves),
        tuple(placed[r.name] for r in recipes),
        sum(r.stored_bytes for r in recipes),
    )


def _in_place(recipe: Recipe) -> Extent | None:
    """The extent whose bytes in the slot are the parameter itself. An offset that the
    dtype does not divide would make a misaligned tensor: that one is copied."""
    extent = recipe.direct
    if extent is None or extent.offset % recipe.dtype.itemsize:
        return None
    return extent


def _slot_offset(extent: Extent, reads: list[Read]) -> int:
    if extent.nbytes == 0:
        return 0
    for read in reads:
        window = read.extent
        if window.path == extent.path and (
            window.offset <= extent.offset and extent.end <= window.end
        ):
            return read.slot_offset + extent.offset - window.offset
    raise AssertionError(f"{extent} is in no window")


def _congruent(position: int, recipe: Recipe, memory_alignment: int) -> int:
    """The first offset from `position` on at which file and slot agree modulo
    `memory_alignment` for the first piece, so that its interior can be read in place.
    """
    if not recipe.pieces or not _is_raw(recipe, recipe.pieces[0]):
        return position
    piece = recipe.pieces[0]
    extent = piece.source_extent
    assert extent is not None, "a raw piece is contiguous"
    target = piece.target.offset * recipe.dtype.itemsize
    return position + (extent.offset - target - position) % memory_alignment


def _is_raw(recipe: Recipe, piece: TensorSlice) -> bool:
    """Whether the piece's bytes are copied one to one into one range of the slot."""
    extent = piece.source_extent
    return (
        extent is not None
        and piece.entry.dtype == recipe.dtype
        and piece.target.is_contiguous
        and extent.offset % recipe.dtype.itemsize == 0
    )


def _assemble(
    recipe: Recipe, piece: TensorSlice, base: int, alignment: int, memory_alignment: int
) -> tuple[list[Read], list[Copy]]:
    if not piece.source.numel:
        return [], []
    if not _is_raw(recipe, piece):
        return [], [_strided_copy(recipe, piece, base)]
    extent = piece.source_extent
    assert extent is not None, "a raw piece is contiguous"
    slot = base + piece.target.offset * recipe.dtype.itemsize
    start = align_up(extent.offset, alignment)
    end = align_down(extent.end, alignment)
    if (slot - extent.offset) % memory_alignment or end <= start:
        return [], [_byte_copy(extent, slot)]
    inside = Extent(extent.path, start, end - start)
    head = Extent(extent.path, extent.offset, start - extent.offset)
    tail = Extent(extent.path, end, extent.end - end)
    edges = [
        _byte_copy(edge, slot + edge.offset - extent.offset)
        for edge in (head, tail)
        if edge.nbytes
    ]
    return [Read(inside, slot + start - extent.offset)], edges


def _byte_copy(extent: Extent, slot_offset: int) -> Copy:
    whole = View.whole((extent.nbytes,))
    return Copy(
        extent, torch.uint8, whole, slot_offset, torch.uint8, extent.nbytes, whole
    )


def _strided_copy(recipe: Recipe, piece: TensorSlice, base: int) -> Copy:
    extent, source = piece.source_extent, piece.source
    if extent is None:  # a part that is no range: read its whole tensor
        entry = piece.entry
        extent = Extent(entry.path, entry.offset, entry.nbytes)
    else:
        source = View.whole(source.shape)
    numel = recipe.nbytes // recipe.dtype.itemsize
    return Copy(
        extent, piece.entry.dtype, source, base, recipe.dtype, numel, piece.target
    )

"""Plans where each byte of a unit lands in the host memory that it is read to. Pure: no
I/O happens here.

On a CPU that memory is the unit's slot, and so it is called here. On a GPU it is the
host tier or a staging buffer, from which a transfer goes on to the slot.

A parameter that is one byte range of a file is read with the aligned window around it.
O_DIRECT can then read the window straight into the slot, and the parameter is a view of
the slot. All other parameters are assembled behind the windows. The whole blocks inside
a slice are read in place where their offsets in file and slot agree modulo the
alignment; the rest is copied.

On a CPU the last bits of a matrix product depend on the address of the weight, modulo
the width of a vector register. So each parameter gets the address, modulo 64 bytes,
that it would have in the resident model. There, transformers maps the file into memory,
so that a tensor used as stored lies at its offset in the file. Any other tensor (a
stack of experts, a cast) comes from torch's allocator, at a multiple of 64.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import torch

from ..checkpoint.header import TensorEntry
from ..codecs.cast import CAST
from ..codecs.codec import Codec
from ..extent import Extent, align_down, align_up, windows
from .recipe import Recipe, TensorSlice, View

TENSOR_ALIGNMENT = 64
"""Bytes: the alignment of torch's allocator (c10::gAlignment), and the size of the
widest vector register."""


@dataclass(frozen=True, slots=True)
class Read:
    """An aligned window of a file that is read straight into the slot."""

    extent: Extent
    slot_offset: int


@dataclass(frozen=True, slots=True)
class Input:
    """Elements of a stored tensor, as a decode takes them."""

    extent: Extent
    dtype: torch.dtype
    view: View
    """The elements of `extent` that are taken."""


@dataclass(frozen=True, slots=True)
class Decode:
    """A part of a parameter that is read into a bounce buffer, from which `codec`
    writes it into the slot. Parts of blocks, and strided parts, which only have to be
    copied, are read so, too.
    """

    codec: Codec
    inputs: tuple[Input, ...]
    """What the codec takes, in its order."""
    target_offset: int
    """Where the whole target tensor begins in the slot, in bytes."""
    target_dtype: torch.dtype
    target_numel: int
    """Elements of the whole target tensor."""
    target: View
    """The elements of it that are written."""

    @property
    def stored_bytes(self) -> int:
        """Bytes to read for it."""
        return sum(each.extent.nbytes for each in self.inputs)


@dataclass(frozen=True, slots=True)
class Move:
    """Moves bytes within the slot that could not be read to their final offset."""

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
    """The whole plan for loading one unit into a slot of `nbytes`."""

    name: str
    nbytes: int
    reads: tuple[Read, ...]
    decodes: tuple[Decode, ...]
    moves: tuple[Move, ...]
    """To be done after all of the above; their own order does not matter."""
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
    """Plans the slot of the unit `name`, whose parameters are made by `recipes`.

    The slot starts at a multiple of `alignment` bytes, and so do reads in their file.
    The memory they are read to is aligned to `memory_alignment`, a divisor of
    `alignment`: 1 for reads through the page cache. Assembled parameters lie at
    multiples of `tensor_alignment`: 64 if they are used in place, 1 if they are copied
    on. Windows at most `max_gap_bytes` apart are read as one.
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
    decodes: list[Decode] = []
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
        for part in recipe.slices:
            more_reads, more_decodes = _assemble(
                recipe, part, base, alignment, memory_alignment
            )
            reads += more_reads
            decodes += more_decodes
    return Layout(
        name,
        max(align_up(position, alignment), alignment),
        tuple(reads),
        tuple(decodes),
        tuple(moves),
        tuple(placed[r.name] for r in recipes),
        sum(r.stored_bytes for r in recipes),
    )


def _in_place(recipe: Recipe) -> Extent | None:
    """The extent whose bytes can serve as the parameter without a copy, or None.

    If the offset is no multiple of the element size, the tensor would be misaligned;
    it is copied instead.
    """
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
    """The first offset from `position` on where the first slice can be read in place.

    There, its offsets in file and slot are equal modulo `memory_alignment`.
    """
    part = recipe.slices[0]
    extent = raw_extent(recipe, part)
    if extent is None:
        return position
    target = part.target.offset * recipe.dtype.itemsize
    return position + (extent.offset - target - position) % memory_alignment


def raw_extent(recipe: Recipe, part: TensorSlice) -> Extent | None:
    """The byte range that is copied as it is into one range of the slot; None if the
    slice is made in another way."""
    extent = part.source_extent
    is_raw = (
        extent is not None
        and part.codec == CAST
        and part.entry.dtype == recipe.dtype
        and part.target.is_contiguous
        and extent.offset % recipe.dtype.itemsize == 0
    )
    return extent if is_raw else None


def _assemble(
    recipe: Recipe, part: TensorSlice, base: int, alignment: int, memory_alignment: int
) -> tuple[list[Read], list[Decode]]:
    if not part.target.numel:
        return [], []
    extent = raw_extent(recipe, part)
    if extent is None:
        return [], [decode_of(recipe, part, base)]
    slot = base + part.target.offset * recipe.dtype.itemsize
    start = align_up(extent.offset, alignment)
    end = align_down(extent.end, alignment)
    if (slot - extent.offset) % memory_alignment or end <= start:
        return [], [byte_copy(extent, slot)]
    inside = Extent(extent.path, start, end - start)
    head = Extent(extent.path, extent.offset, start - extent.offset)
    tail = Extent(extent.path, end, extent.end - end)
    edges = [
        byte_copy(edge, slot + edge.offset - extent.offset)
        for edge in (head, tail)
        if edge.nbytes
    ]
    return [Read(inside, slot + start - extent.offset)], edges


def byte_copy(extent: Extent, slot_offset: int) -> Decode:
    """Copies the bytes of `extent` to `slot_offset` as they are."""
    whole = View.whole((extent.nbytes,))
    source = Input(extent, torch.uint8, whole)
    return Decode(CAST, (source,), slot_offset, torch.uint8, extent.nbytes, whole)


def decode_of(recipe: Recipe, part: TensorSlice, base: int) -> Decode:
    """Makes the slice; the parameter begins at the offset `base` of the slot."""
    extent, source = part.source_extent, part.source
    if extent is None:  # the part is not one byte range: read the whole tensor
        extent = part.entry.extent
    else:
        source = View.whole(source.shape)
    first = Input(extent, part.entry.dtype, source)
    others = (_input(entry, view) for entry, view in part.companion_parts)
    numel = recipe.nbytes // recipe.dtype.itemsize
    return Decode(part.codec, (first, *others), base, recipe.dtype, numel, part.target)


def _input(entry: TensorEntry, view: View) -> Input:
    """The elements of a stored tensor in `view`, which is contiguous."""
    size = entry.dtype.itemsize
    start = entry.offset + view.offset * size
    extent = Extent(entry.path, start, view.numel * size)
    return Input(extent, entry.dtype, View.whole(view.shape))


def whole_input(entry: TensorEntry) -> Input:
    """All elements of a stored tensor."""
    return Input(entry.extent, entry.dtype, View.whole(entry.shape))

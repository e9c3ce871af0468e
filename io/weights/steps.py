"""The steps of a load: what is read, decoded and moved, from where to where. Pure."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ..checkpoint.header import TensorEntry
from ..codecs.cast import CAST
from ..codecs.codec import Codec
from ..extent import Extent, align_down, align_up, aligned
from .recipe import Recipe, TensorSlice, View


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
    """Not behind `source_offset`; the two ranges may overlap."""
    nbytes: int


@dataclass(frozen=True, slots=True)
class Chain:
    """Puts the parts of a parameter together, each read to a window behind the last.

    A move begins once its window is read, and all moves before it are done. No move
    writes to a later window, which may be read meanwhile.
    """

    name: str
    first_read: int
    """The index of the read that the first move waits for; the next one waits for the
    next."""
    moves: tuple[Move, ...]


@dataclass(frozen=True, slots=True)
class LoadSteps:
    """All steps of the load of one unit."""

    reads: tuple[Read, ...] = ()
    decodes: tuple[Decode, ...] = ()
    chains: tuple[Chain, ...] = ()


def raw_extent(recipe: Recipe, part: TensorSlice) -> Extent | None:
    """The byte range that is copied as it is into one range of the slot; None if the
    slice is made in another way."""
    if part.entry.dtype is not recipe.dtype or not part.target.is_contiguous:
        return None
    if part.codec is not CAST and part.codec != CAST:
        return None
    extent = part.source_extent
    if extent is None or extent.offset % recipe.dtype.itemsize:
        return None
    return extent


def assembled(
    recipe: Recipe, part: TensorSlice, base: int, alignment: int, memory_alignment: int
) -> tuple[list[Read], list[Decode]]:
    """Makes the slice; the parameter begins at the offset `base` of the slot.

    The whole blocks inside a slice are read in place where their offsets in file and
    slot agree modulo `memory_alignment`; the rest is copied.
    """
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


def all_steps(
    reads: Sequence[Read],
    behind: Sequence[tuple[Recipe, int]],
    chained: Sequence[tuple[str, int, Sequence[tuple[int, Extent]]]],
    alignment: int,
    memory_alignment: int,
) -> LoadSteps:
    """The steps of the load of a unit that begins with the windows `reads`.

    Parameters `behind` them are assembled at an offset. Others are `chained`: their
    parts are byte ranges, each with its start in the parameter.
    """
    found = list(reads)
    decodes: list[Decode] = []
    for recipe, base in behind:
        for part in recipe.slices:
            more, made = assembled(recipe, part, base, alignment, memory_alignment)
            found += more
            decodes += made
    chains: list[Chain] = []
    for name, base, parts in chained:
        first, moves, position = len(found), [], align_up(base, memory_alignment)
        for start, extent in parts:
            window = aligned(extent, alignment)
            found.append(Read(window, position))
            source = position + extent.offset - window.offset
            moves.append(Move(source, base + start, extent.nbytes))
            position += window.nbytes
        chains.append(Chain(name, first, tuple(moves)))
    return LoadSteps(tuple(found), tuple(decodes), tuple(chains))


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

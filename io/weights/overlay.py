"""Plans the load of a unit whose tensors come partly from another file. Pure."""

from collections.abc import Iterator, Mapping
from dataclasses import replace

import torch

from ..checkpoint.header import TensorEntry
from ..codecs.cast import CAST
from ..extent import Extent, align_down, align_up
from .layout import Layout, Placed
from .recipe import View
from .steps import Decode, LoadSteps, Read, byte_copy, whole_input

_Range = tuple[int, int]
"""Start and end of a byte range of the slot; the end is not part of it."""


def overlaid(
    plan: Layout, entries: Mapping[str, TensorEntry], *, alignment: int
) -> Layout:
    """Returns `plan`, changed to read the tensors named in `entries` from there.

    The slot keeps its size, and every tensor its offset. A window that contains such a
    tensor is replaced by reads around it, aligned to `alignment` bytes.
    """
    ranges = {tensor.name: _ranges(tensor) for tensor in plan.tensors}
    taken = [each for name in entries for each in ranges[name]]
    kept = sorted(r for name, rs in ranges.items() if name not in entries for r in rs)
    reads: list[Read] = []
    decodes = [d for d in plan.decodes if not _is_in(d.target_offset, taken)]
    chained = {
        index
        for chain in plan.chains
        for index in range(chain.first_read, chain.first_read + len(chain.moves))
    }
    for index, read in enumerate(plan.reads):
        if index in chained:
            continue
        window = read.slot_offset, read.slot_offset + read.extent.nbytes
        if not any(_common(window, other) for other in taken):
            reads.append(read)
            continue
        for part in _merged(filter(None, (_common(window, r) for r in kept))):
            inside, edges = _cut(read, part, alignment)
            reads += inside
            decodes += edges
    placed = {tensor.name: tensor for tensor in plan.tensors}
    for name, entry in entries.items():
        decodes += _copies(entry, placed[name])
    chains = []
    for chain in plan.chains:
        if chain.name not in entries:
            first, last = chain.first_read, chain.first_read + len(chain.moves)
            chains.append(replace(chain, first_read=len(reads)))
            reads += plan.reads[first:last]
    return Layout.of(
        plan.name,
        plan.nbytes,
        LoadSteps(tuple(reads), tuple(decodes), tuple(chains)),
        plan.tensors,
        plan.stored_bytes,
    )


def _ranges(tensor: Placed) -> list[_Range]:
    if tensor.fragments:
        return [(part.offset, part.offset + part.nbytes) for part in tensor.fragments]
    nbytes = torch.Size(tensor.shape).numel() * tensor.dtype.itemsize
    return [(tensor.offset, tensor.offset + nbytes)]


def _is_in(offset: int, ranges: list[_Range]) -> bool:
    return any(start <= offset < end for start, end in ranges)


def _common(one: _Range, other: _Range) -> _Range | None:
    start, end = max(one[0], other[0]), min(one[1], other[1])
    return (start, end) if start < end else None


def _merged(ranges: Iterator[_Range]) -> list[_Range]:
    merged: list[_Range] = []
    for start, end in ranges:
        if merged and start <= merged[-1][1]:
            merged[-1] = merged[-1][0], max(end, merged[-1][1])
        else:
            merged.append((start, end))
    return merged


def _cut(read: Read, part: _Range, alignment: int) -> tuple[list[Read], list[Decode]]:
    """Reads only the bytes `part` of the slot, instead of all that `read` fills.

    Whole blocks are read in place; the rest at both ends is copied.
    """
    ahead = read.extent.offset - read.slot_offset
    path, first, last = read.extent.path, part[0] + ahead, part[1] + ahead
    start, end = align_up(first, alignment), align_down(last, alignment)
    if end <= start:
        return [], [byte_copy(Extent(path, first, last - first), part[0])]
    edges = [(first, start), (end, last)]
    return (
        [Read(Extent(path, start, end - start), start - ahead)],
        [byte_copy(Extent(path, a, b - a), a - ahead) for a, b in edges if a < b],
    )


def _copies(entry: TensorEntry, placed: Placed) -> Iterator[Decode]:
    """Puts the stored tensor `entry` where `placed` says."""
    if not entry.nbytes:
        return
    for part in placed.fragments:
        extent = Extent(entry.path, entry.offset + part.start, part.nbytes)
        yield byte_copy(extent, part.offset)
    if not placed.fragments:
        whole = View.whole(entry.shape)
        inputs = (whole_input(entry),)
        yield Decode(CAST, inputs, placed.offset, placed.dtype, whole.numel, whole)

"""Plans the load of a unit whose tensors come partly from another file. Pure."""

from collections.abc import Iterator, Mapping
from dataclasses import replace

import torch

from ..checkpoint.header import TensorEntry
from ..codecs.cast import CAST
from ..extent import Extent, align_down, align_up
from .layout import Decode, Layout, Placed, Read, byte_copy, whole_input
from .recipe import View

_Range = tuple[int, int]
"""Start and end of a byte range of the slot; the end is not part of it."""


def overlaid(
    plan: Layout, entries: Mapping[str, TensorEntry], *, alignment: int
) -> Layout:
    """Returns `plan`, changed to read the tensors named in `entries` from there.

    The slot keeps its size, and every tensor its offset. A window that contains such a
    tensor is replaced by reads around it, aligned to `alignment` bytes.
    """
    ranges = {tensor.name: _range(tensor) for tensor in plan.tensors}
    taken = [ranges[name] for name in entries]
    kept = sorted(r for name, r in ranges.items() if name not in entries)
    reads: list[Read] = []
    decodes = [d for d in plan.decodes if not _is_in(d.target_offset, taken)]
    for read in plan.reads:
        window = read.slot_offset, read.slot_offset + read.extent.nbytes
        if not any(_common(window, other) for other in taken):
            reads.append(read)
            continue
        for part in _merged(filter(None, (_common(window, r) for r in kept))):
            inside, edges = _cut(read, part, alignment)
            reads += inside
            decodes += edges
    placed = {tensor.name: tensor for tensor in plan.tensors}
    decodes += [_cast(e, placed[name]) for name, e in entries.items() if e.nbytes]
    return replace(
        plan,
        reads=tuple(reads),
        decodes=tuple(decodes),
        moves=tuple(m for m in plan.moves if not _is_in(m.target_offset, taken)),
    )


def _range(tensor: Placed) -> _Range:
    nbytes = torch.Size(tensor.shape).numel() * tensor.dtype.itemsize
    return tensor.offset, tensor.offset + nbytes


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


def _cast(entry: TensorEntry, placed: Placed) -> Decode:
    whole = View.whole(entry.shape)
    inputs = (whole_input(entry),)
    return Decode(CAST, inputs, placed.offset, placed.dtype, whole.numel, whole)

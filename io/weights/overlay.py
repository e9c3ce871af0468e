"""A unit some of whose tensors have other values than in the checkpoint. Pure."""

from collections.abc import Iterator, Mapping
from dataclasses import replace

import torch

from ..checkpoint.header import TensorEntry
from ..extent import Extent, align_down, align_up
from .layout import Copy, Layout, Placed, Read
from .recipe import View

_Range = tuple[int, int]
"""From the first byte to behind the last one, in the slot."""


def overlaid(
    plan: Layout, entries: Mapping[str, TensorEntry], *, alignment: int
) -> Layout:
    """`plan` with the tensors called in `entries` read from there. Every tensor stays
    where it is in the slot, which keeps its size: what is read in one piece with such a
    tensor now is read around it."""
    ranges = {tensor.name: _range(tensor) for tensor in plan.tensors}
    taken = [ranges[name] for name in entries]
    kept = sorted(r for name, r in ranges.items() if name not in entries)
    reads: list[Read] = []
    copies = [c for c in plan.copies if not _is_in(c.target_offset, taken)]
    for read in plan.reads:
        window = read.slot_offset, read.slot_offset + read.extent.nbytes
        if not any(_common(window, other) for other in taken):
            reads.append(read)
            continue
        for part in _merged(filter(None, (_common(window, r) for r in kept))):
            inside, edges = _cut(read, part, alignment)
            reads += inside
            copies += edges
    placed = {tensor.name: tensor for tensor in plan.tensors}
    copies += [_copy(e, placed[name]) for name, e in entries.items() if e.nbytes]
    return replace(
        plan,
        reads=tuple(reads),
        copies=tuple(copies),
        conversions=tuple(
            c for c in plan.conversions if not _is_in(c.target_offset, taken)
        ),
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
    found: list[_Range] = []
    for start, end in ranges:
        if found and start <= found[-1][1]:
            found[-1] = found[-1][0], max(end, found[-1][1])
        else:
            found.append((start, end))
    return found


def _cut(read: Read, part: _Range, alignment: int) -> tuple[list[Read], list[Copy]]:
    """The bytes `part` of the slot, which `read` fills among others: whole blocks go on
    to be read in place, what is left at both ends is copied."""
    ahead = read.extent.offset - read.slot_offset
    path, first, last = read.extent.path, part[0] + ahead, part[1] + ahead
    start, end = align_up(first, alignment), align_down(last, alignment)
    if end <= start:
        return [], [_bytes(Extent(path, first, last - first), part[0])]
    edges = [(first, start), (end, last)]
    return (
        [Read(Extent(path, start, end - start), start - ahead)],
        [_bytes(Extent(path, a, b - a), a - ahead) for a, b in edges if a < b],
    )


def _bytes(extent: Extent, slot_offset: int) -> Copy:
    whole = View.whole((extent.nbytes,))
    kind = torch.uint8
    return Copy(extent, kind, whole, slot_offset, kind, extent.nbytes, whole)


def _copy(entry: TensorEntry, placed: Placed) -> Copy:
    whole = View.whole(entry.shape)
    extent = Extent(entry.path, entry.offset, entry.nbytes)
    numel = whole.numel
    return Copy(extent, entry.dtype, whole, placed.offset, placed.dtype, numel, whole)

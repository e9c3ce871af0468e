"""Plans where each byte of a unit lands in the host memory that it is read to. Pure: no
I/O happens here.

On a CPU that memory is the unit's slot, and so it is called here. On a GPU it is the
host tier or a staging buffer, from which a transfer goes on to the slot.

A parameter that is one byte range of a file is read with the aligned window around it.
O_DIRECT can then read the window straight into the slot, and the parameter is a view of
the slot. So is a parameter of several byte ranges (a stack of experts) read for a GPU:
each range has a window of its own, and the transfer puts them together. All other
parameters are assembled behind the windows; see assembling.py.

On a CPU the last bits of a matrix product depend on the address of the weight, modulo
the width of a vector register. So each parameter gets the address, modulo 64 bytes,
that it would have in the resident model. There, transformers maps the file into memory,
so that a tensor used as stored lies at its offset in the file. Any other tensor (a
stack of experts, a cast) comes from torch's allocator, at a multiple of 64.

A layout says at once how large it is and where parameters lie. The steps of a load,
thousands for a block of experts, are worked out when they are first needed.
"""

from bisect import bisect_right
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path

import torch

from ..codecs.codec import Codec
from ..extent import Extent, align_up, aligned, windows
from .recipe import Recipe, TensorSlice
from .steps import Chain, Decode, LoadSteps, Read, all_steps, raw_extent

TENSOR_ALIGNMENT = 64
"""Bytes: the alignment of torch's allocator (c10::gAlignment), and the size of the
widest vector register."""
MIN_BLOCKS = 32
"""Byte ranges with fewer blocks on average get no windows of their own, which would
take up to two blocks more."""


@dataclass(frozen=True, slots=True)
class Fragment:
    """A byte range of a parameter that lies apart from the rest of it."""

    offset: int
    """Where it lies."""
    start: int
    """Where it belongs, in bytes from the start of the parameter."""
    nbytes: int


@dataclass(frozen=True, slots=True)
class Placed:
    """A finished parameter inside the slot."""

    name: str
    offset: int
    dtype: torch.dtype
    shape: tuple[int, ...]
    fragments: tuple[Fragment, ...] = ()
    """All of it, in order, if it does not lie in one piece. Then `offset` is that of
    the first."""


@dataclass(frozen=True)
class Layout:
    """The whole plan for loading one unit into a slot of `nbytes`."""

    name: str
    nbytes: int
    tensors: tuple[Placed, ...]
    stored_bytes: int
    """Bytes of the checkpoint that make this unit, each counted once."""
    decoded: Mapping[str, int]
    """Bytes of the checkpoint that each codec takes, by its name. Blocks of which one
    part is copied, and the rest read in place, do not count."""
    uses_kernels: bool
    """Whether a codec does."""
    plan_steps: Callable[[], LoadSteps] = field(repr=False, compare=False)
    """Works out the steps of a load."""

    @classmethod
    def of(
        cls,
        name: str,
        nbytes: int,
        steps: LoadSteps,
        tensors: tuple[Placed, ...],
        stored_bytes: int,
    ) -> "Layout":
        """A layout whose steps are known."""
        decoded = _by_codec((d.codec, d.stored_bytes) for d in steps.decodes)
        uses_kernels = any(each.codec.uses_kernels for each in steps.decodes)
        return cls(
            name,
            nbytes,
            tensors,
            stored_bytes,
            decoded,
            uses_kernels,
            lambda: steps,
        )

    @cached_property
    def steps(self) -> LoadSteps:
        return self.plan_steps()

    @property
    def reads(self) -> tuple[Read, ...]:
        return self.steps.reads

    @property
    def decodes(self) -> tuple[Decode, ...]:
        return self.steps.decodes

    @property
    def chains(self) -> tuple[Chain, ...]:
        return self.steps.chains


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
    on. In that case, parameters of several byte ranges lie in fragments. Windows at
    most `max_gap_bytes` apart are read as one.
    """
    recipes = list(recipes)
    is_copied_on = tensor_alignment == 1
    apart = {r.name: ranges for r in recipes if (ranges := _in_place(r)) is not None}
    parts = {r.name: _ranges(r, alignment) for r in recipes if r.name not in apart}
    if is_copied_on:
        apart |= {name: ranges for name, ranges in parts.items() if ranges}
    in_windows = Windows(
        windows(
            (extent for ranges in apart.values() for _, extent in ranges),
            alignment=alignment,
            max_gap_bytes=max_gap_bytes,
        )
    )
    position = in_windows.nbytes
    placed: list[Placed] = []
    behind: list[tuple[Recipe, int]] = []
    chained: list[tuple[str, int, Ranges]] = []
    parts_made: list[TensorSlice] = []
    for recipe in recipes:
        if recipe.name in apart:
            placed.append(_placed(recipe, apart[recipe.name], in_windows))
            continue
        ranges = parts[recipe.name]
        base, is_read_there = _base(
            position, ranges, memory_alignment, tensor_alignment
        )
        placed.append(Placed(recipe.name, base, recipe.dtype, recipe.shape))
        if is_read_there or not ranges:
            behind.append((recipe, base))
            end = base + recipe.nbytes
            if not is_read_there:
                parts_made += recipe.slices
        else:
            chained.append((recipe.name, base, ranges))
            end = align_up(base, memory_alignment)
            end += sum(aligned(extent, alignment).nbytes for _, extent in ranges)
        position = align_up(end, alignment)
    return Layout(
        name,
        max(position, alignment),
        tuple(placed),
        sum(r.stored_bytes for r in recipes),
        _by_codec((part.codec, part.stored_bytes) for part in parts_made),
        any(part.codec.uses_kernels for part in parts_made),
        partial(
            all_steps, in_windows.reads, behind, chained, alignment, memory_alignment
        ),
    )


def _by_codec(parts: Iterable[tuple[Codec, int]]) -> Mapping[str, int]:
    found: dict[str, int] = {}
    for codec, nbytes in parts:
        found[codec.name] = found.get(codec.name, 0) + nbytes
    return found


class Windows:
    """Windows of files, read one behind the other, and where they put byte ranges."""

    def __init__(self, windows: Iterable[Extent]) -> None:
        reads: list[Read] = []
        self._by_path: dict[Path, tuple[list[int], list[Read]]] = {}
        self.nbytes = 0
        for window in windows:
            starts, here = self._by_path.setdefault(window.path, ([], []))
            starts.append(window.offset)
            here.append(Read(window, self.nbytes))
            reads.append(here[-1])
            self.nbytes += window.nbytes
        self.reads = tuple(reads)

    def offset_of(self, extent: Extent) -> int:
        """Where `extent`, which is in a window, lies: in bytes from the first one."""
        if not extent.nbytes:
            return 0
        starts, here = self._by_path[extent.path]
        read = here[bisect_right(starts, extent.offset) - 1]
        ahead = extent.offset - read.extent.offset
        assert ahead + extent.nbytes <= read.extent.nbytes, f"{extent} is in no window"
        return read.slot_offset + ahead


Ranges = Sequence[tuple[int, Extent]]
"""Byte ranges that are a parameter, one behind the other; each with its start there in
bytes."""


def _in_place(recipe: Recipe) -> Ranges | None:
    """The byte range that can serve as the parameter without a copy, or None.

    If the offset is no multiple of the element size, the tensor would be misaligned;
    it is copied instead.
    """
    extent = recipe.direct
    if extent is None or extent.offset % recipe.dtype.itemsize:
        return None
    return [(0, extent)]


def _ranges(recipe: Recipe, alignment: int) -> Ranges:
    """The byte ranges that are the parameter; none if a part of it is made in another
    way, or if they are small."""
    size = recipe.dtype.itemsize
    found: list[tuple[int, Extent]] = []
    for part in recipe.slices:
        extent = raw_extent(recipe, part)
        if extent is None:
            return ()
        if extent.nbytes:
            found.append((part.target.offset * size, extent))
    found.sort(key=lambda each: each[0])
    joined: list[tuple[int, Extent]] = []
    for start, extent in found:
        if joined:
            begin, last = joined[-1]
            if extent.offset == last.end and extent.path == last.path:
                whole = Extent(last.path, last.offset, last.nbytes + extent.nbytes)
                joined[-1] = begin, whole
                continue
        joined.append((start, extent))
    is_large = recipe.nbytes >= MIN_BLOCKS * alignment * len(joined)
    return joined if is_large else ()


def _placed(recipe: Recipe, ranges: Ranges, in_windows: Windows) -> Placed:
    fragments = tuple(
        Fragment(in_windows.offset_of(extent), start, extent.nbytes)
        for start, extent in ranges
    )
    return Placed(
        recipe.name,
        fragments[0].offset,
        recipe.dtype,
        recipe.shape,
        fragments if len(fragments) > 1 else (),
    )


def _base(
    position: int, ranges: Ranges, memory_alignment: int, tensor_alignment: int
) -> tuple[int, bool]:
    """The first offset from `position` on for a parameter of `ranges`, and whether all
    of them can be read there.

    They can if it agrees with the offsets in their files modulo `memory_alignment`.
    """
    base = align_up(position, tensor_alignment)
    residues = {(extent.offset - start) % memory_alignment for start, extent in ranges}
    if len(residues) != 1:
        return base, False
    (residue,) = residues
    if memory_alignment > tensor_alignment:
        found = base + (residue - base) % memory_alignment
        return (base, False) if found % tensor_alignment else (found, True)
    return base, residue == base % memory_alignment

"""Byte ranges of files and how they coalesce into aligned reads. Pure: no I/O."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True, order=True)
class Extent:
    """A byte range of one file."""

    path: Path
    offset: int
    nbytes: int

    @property
    def end(self) -> int:
        return self.offset + self.nbytes


def align_down(value: int, alignment: int) -> int:
    return value - value % alignment


def align_up(value: int, alignment: int) -> int:
    return value + -value % alignment


def aligned(extent: Extent, alignment: int) -> Extent:
    """The smallest aligned window around `extent`."""
    start = align_down(extent.offset, alignment)
    return Extent(extent.path, start, align_up(extent.end, alignment) - start)


def windows(
    extents: Iterable[Extent], *, alignment: int, max_gap_bytes: int
) -> tuple[Extent, ...]:
    """The aligned windows that cover `extents`, in file order.

    Two extents share a window when at most `max_gap_bytes` lie between their own
    windows: one long read beats two short ones. Zero-length extents need no read.
    """
    merged: list[Extent] = []
    for extent in sorted(e for e in extents if e.nbytes):
        window = aligned(extent, alignment)
        last = merged[-1] if merged else None
        if (
            last is not None
            and last.path == window.path
            and window.offset <= last.end + max_gap_bytes
        ):
            end = max(last.end, window.end)
            merged[-1] = Extent(last.path, last.offset, end - last.offset)
        else:
            merged.append(window)
    return tuple(merged)


def chunks(extent: Extent, *, max_chunk_bytes: int) -> Iterator[Extent]:
    """`extent` cut into consecutive pieces of at most `max_chunk_bytes`."""
    for offset in range(extent.offset, extent.end, max_chunk_bytes):
        nbytes = min(max_chunk_bytes, extent.end - offset)
        yield Extent(extent.path, offset, nbytes)

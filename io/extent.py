"""Byte ranges of files, and how they are combined into aligned reads. Pure: no I/O."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

_MIN_BALANCED_BYTES = 1 << 20


@dataclass(frozen=True, slots=True, order=True)
class Extent:
    """A byte range of one file."""

    path: Path
    offset: int
    nbytes: int

    @property
    def end(self) -> int:
        """The offset behind the last byte."""
        return self.offset + self.nbytes


def align_down(value: int, alignment: int) -> int:
    """The largest multiple of `alignment` that is at most `value`."""
    return value - value % alignment


def align_up(value: int, alignment: int) -> int:
    """The smallest multiple of `alignment` that is at least `value`."""
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
    windows, since one long read is faster than two short ones. Empty extents need none.
    """
    merged: list[Extent] = []
    found = (extent for extent in extents if extent.nbytes)
    for extent in sorted(found, key=lambda e: (str(e.path), e.offset, e.nbytes)):
        window = aligned(extent, alignment)
        last = merged[-1] if merged else None
        if (
            last is not None
            and (last.path is window.path or last.path == window.path)
            and window.offset <= last.end + max_gap_bytes
        ):
            end = max(last.end, window.end)
            merged[-1] = Extent(last.path, last.offset, end - last.offset)
        else:
            merged.append(window)
    return tuple(merged)


def chunks(
    extent: Extent, *, alignment: int, max_chunk_bytes: int, max_concurrency: int
) -> Iterator[Extent]:
    """Cuts `extent`, whose start is aligned, into consecutive chunks of similar size.

    Each is aligned and has at most `max_chunk_bytes`, or one page if that is more.
    Their number is a multiple of `max_concurrency` if each then has a megabyte or more.
    So all lanes end at the same time, and none is idle while another reads the rest.
    """
    if not extent.nbytes:
        return
    pages = -(-extent.nbytes // alignment)
    num = -(-pages // max(max_chunk_bytes // alignment, 1))
    balanced = align_up(num, max_concurrency)
    if extent.nbytes >= balanced * _MIN_BALANCED_BYTES:
        num = balanced
    for index in range(num):
        start = extent.offset + index * pages // num * alignment
        end = extent.offset + (index + 1) * pages // num * alignment
        yield Extent(extent.path, start, min(end, extent.end) - start)

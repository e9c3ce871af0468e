"""Plans where the bytes of a storage lie in a file, and what an append writes. Pure.

A storage is a sequence of bytes, token after token. The file holds whole pages of it,
each written once. The rest, less than a page, stays in memory until the page is full.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from ..extent import align_down

PAGE_BYTES = 16 << 10


@dataclass(frozen=True, slots=True)
class PageSpan:
    """A part of a byte range that lies in one segment of a file or of memory."""

    segment: int
    """Index of the segment."""
    offset: int
    """Where the part begins in the segment, in bytes."""
    position: int
    """Where the part begins in the requested range, in bytes."""
    nbytes: int


def spans(sizes: Sequence[int], start: int, end: int) -> Iterator[PageSpan]:
    """Where the bytes `start` ... `end` lie in consecutive segments of `sizes`."""
    low = 0
    for segment, size in enumerate(sizes):
        first, last = max(start, low), min(end, low + size)
        if first < last:
            yield PageSpan(segment, first - low, first - start, last - first)
        low += size
    assert end <= low, "the segments hold the whole range"


@dataclass(frozen=True, slots=True)
class Append:
    """What an append does to a storage whose last bytes are a tail in memory."""

    write_start: int
    """The bytes `write_start` ... `write_end`, whole pages, go to the file: first the
    tail, then the first `num_written` new bytes."""
    write_end: int
    num_written: int
    """New bytes that are written; the other new bytes are added to the tail."""


def plan_append(length: int, nbytes: int, page_bytes: int) -> Append:
    """Plans how `nbytes` are appended to a storage of `length` bytes."""
    start = align_down(length, page_bytes)
    end = align_down(length + nbytes, page_bytes)
    return Append(start, end, max(end - length, 0))


class FreeList:
    """Hands out byte ranges of a growing file, the lowest that fit first."""

    def __init__(self) -> None:
        self.end = 0
        """The end of the last range in use."""
        self._gaps: list[tuple[int, int]] = []

    def take(self, nbytes: int) -> int:
        """Takes `nbytes` that are free, and returns their offset."""
        for index, (start, end) in enumerate(self._gaps):
            if end - start >= nbytes:
                self._gaps[index : index + 1] = (
                    [(start + nbytes, end)] if end - start > nbytes else []
                )
                return start
        start, self.end = self.end, self.end + nbytes
        return start

    def give_back(self, offset: int, nbytes: int) -> None:
        """Frees a range that was taken."""
        gaps = sorted([*self._gaps, (offset, offset + nbytes)])
        merged: list[tuple[int, int]] = []
        for start, end in gaps:
            if merged and merged[-1][1] == start:
                merged[-1] = merged[-1][0], end
            else:
                merged.append((start, end))
        if merged and merged[-1][1] == self.end:
            self.end = merged.pop()[0]
        self._gaps = merged

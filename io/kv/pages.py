"""Where a strip's bytes lie in a file, and what an append writes. Pure.

A strip is a stream of bytes, token after token. Whole pages of it are in the file, each
written once; what is less than a page stays in memory until it is one.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from ..extent import align_down

PAGE_BYTES = 16 << 10


@dataclass(frozen=True, slots=True)
class PageSpan:
    """Bytes of the stream that lie in one piece of a file or of memory."""

    piece: int
    offset: int
    """In the piece."""
    position: int
    """In what is asked for: 0 is its first byte."""
    nbytes: int


def spans(sizes: Sequence[int], start: int, end: int) -> Iterator[PageSpan]:
    """Where the bytes `start` ... `end` lie in pieces of these `sizes`."""
    low = 0
    for piece, size in enumerate(sizes):
        first, last = max(start, low), min(end, low + size)
        if first < last:
            yield PageSpan(piece, first - low, first - start, last - first)
        low += size
    assert end <= low, "the pieces hold all that is asked for"


@dataclass(frozen=True, slots=True)
class Append:
    """What an append to a stream does, whose last bytes are the tail in memory."""

    write_start: int
    """The whole pages `write_start` ... `write_end` of the stream go to the file: the
    tail, then the first `num_written` bytes of what is new."""
    write_end: int
    num_written: int
    """Of what is new; the rest becomes the tail, or is added to it."""


def plan_append(length: int, nbytes: int, page_bytes: int) -> Append:
    """`nbytes` come to a stream of `length` bytes."""
    start = align_down(length, page_bytes)
    end = align_down(length + nbytes, page_bytes)
    return Append(start, end, max(end - length, 0))


class FreeList:
    """Byte ranges of a file that grows without end, the lowest that fit first."""

    def __init__(self) -> None:
        self.end = 0
        """Nothing beyond is in use."""
        self._gaps: list[tuple[int, int]] = []

    def take(self, nbytes: int) -> int:
        """The offset of `nbytes` that nobody has."""
        for index, (start, end) in enumerate(self._gaps):
            if end - start >= nbytes:
                self._gaps[index : index + 1] = (
                    [(start + nbytes, end)] if end - start > nbytes else []
                )
                return start
        start, self.end = self.end, self.end + nbytes
        return start

    def give_back(self, offset: int, nbytes: int) -> None:
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

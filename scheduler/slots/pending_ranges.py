"""Bytes that were freed while a device may still work on them. Pure.

The host runs ahead of the device: it frees a slot when the last kernel that reads it
has been queued, not when that kernel has run. The next write must wait for the kernel.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Generic, TypeVar

Mark = TypeVar("Mark")


@dataclass(frozen=True, slots=True)
class _Range(Generic[Mark]):
    start: int
    end: int
    mark: Mark


class PendingRanges(Generic[Mark]):
    """Remembers, for each range of bytes, the marks to wait for before writing there.
    A mark is anything that compares equal to itself, such as a CUDA event."""

    def __init__(self) -> None:
        self._ranges: list[_Range[Mark]] = []

    def __len__(self) -> int:
        return len(self._ranges)

    def add(self, start: int, end: int, marks: Iterable[Mark]) -> None:
        """The bytes from `start` to `end` may be written once all `marks` passed."""
        self._ranges += [_Range(start, end, mark) for mark in marks]

    def take(self, start: int, end: int) -> tuple[Mark, ...]:
        """Returns what to wait for before writing the bytes from `start` to `end`, and
        forgets it for these bytes: from now on the caller owns them. Ranges that reach
        beyond them are cut, and the rest of them is kept."""
        marks: list[Mark] = []
        kept: list[_Range[Mark]] = []
        for r in self._ranges:
            if r.end <= start or end <= r.start:
                kept.append(r)
                continue
            if r.mark not in marks:
                marks.append(r.mark)
            if r.start < start:
                kept.append(_Range(r.start, start, r.mark))
            if end < r.end:
                kept.append(_Range(end, r.end, r.mark))
        self._ranges = kept
        return tuple(marks)

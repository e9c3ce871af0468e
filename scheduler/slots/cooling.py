"""Bytes that nobody holds any more, while a device may still be at work on them. Pure.

The host runs ahead of the device: a slot is given back when the last kernel that reads
it has been queued, not when it has run. Whoever writes there next must wait for that.
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
    """Remembers what to wait for, byte for byte."""

    def __init__(self) -> None:
        self._ranges: list[_Range[Mark]] = []

    def __len__(self) -> int:
        return len(self._ranges)

    def add(self, start: int, end: int, marks: Iterable[Mark]) -> None:
        """The bytes from `start` to `end` are free after `marks`."""
        self._ranges += [_Range(start, end, mark) for mark in marks]

    def take(self, start: int, end: int) -> tuple[Mark, ...]:
        """What to wait for before the bytes from `start` to `end` are written. They
        are the caller's from now on: what is left of older ranges lies beside them."""
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

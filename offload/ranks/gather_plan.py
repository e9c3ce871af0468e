"""Which bytes of a unit each rank reads, where all ranks need all of them. Pure."""

from bisect import bisect_right
from collections.abc import Iterator
from functools import cached_property
from itertools import accumulate
from pathlib import Path

from ...io.extent import Extent, windows
from ...io.readers.files import ALIGNMENT
from ...io.weights.layout import Layout


class GatherPlan:
    """The windows of files that hold the unit of `layout`, one behind the other: each
    byte once. `num_ranks` ranks read a part each: whole blocks of 4096 bytes, so that
    parts differ by one block at most."""

    def __init__(self, layout: Layout, num_ranks: int) -> None:
        self.name = layout.name
        self._layout = layout
        self._num_ranks = num_ranks

    @cached_property
    def windows(self) -> tuple[Extent, ...]:
        reads = [read.extent for read in self._layout.reads]
        inputs = [one.extent for each in self._layout.decodes for one in each.inputs]
        return windows([*reads, *inputs], alignment=ALIGNMENT, max_gap_bytes=0)

    @cached_property
    def _starts(self) -> list[int]:
        """Where each window begins among the bytes of all, and where the last ends."""
        return list(accumulate((one.nbytes for one in self.windows), initial=0))

    @property
    def nbytes(self) -> int:
        """The bytes of all windows."""
        return self._starts[-1]

    def part(self, rank: int) -> tuple[int, int]:
        """Where the part of `rank` begins and ends among the bytes of all windows."""
        blocks = self.nbytes // ALIGNMENT
        start, end = (blocks * r // self._num_ranks for r in (rank, rank + 1))
        return start * ALIGNMENT, end * ALIGNMENT

    def extents(self, start: int, end: int) -> Iterator[Extent]:
        """The byte ranges of files that are the bytes from `start` to `end`."""
        index = bisect_right(self._starts, start) - 1
        while start < end:
            window = self.windows[index]
            ahead = start - self._starts[index]
            nbytes = min(window.nbytes - ahead, end - start)
            yield Extent(window.path, window.offset + ahead, nbytes)
            start += nbytes
            index += 1

    def find(self, extent: Extent) -> int | None:
        """Where `extent` begins among the bytes of all windows; None if it is in none
        of them."""
        offsets, indices = self._by_path.get(extent.path, ([], []))
        place = bisect_right(offsets, extent.offset) - 1
        if place < 0:
            return None
        window = self.windows[indices[place]]
        if extent.end > window.end:
            return None
        return self._starts[indices[place]] + extent.offset - window.offset

    @cached_property
    def _by_path(self) -> dict[Path, tuple[list[int], list[int]]]:
        found: dict[Path, tuple[list[int], list[int]]] = {}
        for index, window in enumerate(self.windows):
            offsets, indices = found.setdefault(window.path, ([], []))
            offsets.append(window.offset)
            indices.append(index)
        return found

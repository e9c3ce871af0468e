"""The bytes of units that ranks have sent to each other, read as if from files."""

import threading
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ...io.closing import Closing
from ...io.extent import Extent
from ...io.handle import Handle
from ...io.readers.reader import Reader, ReaderStatistics
from .gather_plan import GatherPlan


@dataclass(frozen=True, eq=False)
class Gathered:
    """All bytes of the unit of `plan`: `parts` has those of each rank, uint8 of one
    dimension on the CPU."""

    plan: GatherPlan
    parts: Sequence[torch.Tensor]

    def copy(self, start: int, target: torch.Tensor) -> None:
        """Copies the bytes from `start` on into `target`, uint8 of one dimension."""
        end = start + target.numel()
        for rank, part in enumerate(self.parts):
            begin, stop = self.plan.part(rank)
            low, high = max(begin, start), min(stop, end)
            if low < high:
                target[low - start : high - start] = part[low - begin : high - begin]


class GatheredReader(Closing):
    """A reader of what was gathered: an extent is copied from a unit that has it, of
    those that were added. The files themselves are read by `below`."""

    alignment = 1

    def __init__(self, below: Reader) -> None:
        self.name = below.name
        self._below = below
        self._lock = threading.Lock()
        self._there: list[Gathered] = []

    def add(self, unit: Gathered) -> None:
        """From now on the bytes of `unit` can be read."""
        with self._lock:
            self._there.append(unit)

    def remove(self, unit: Gathered) -> None:
        with self._lock:
            self._there.remove(unit)

    def submit(
        self, extent: Extent, buffer: memoryview, *, urgent: bool = False
    ) -> Handle:
        """Copies `extent` into `buffer`, on the caller's thread."""
        handle = Handle(1)
        if extent.nbytes:
            unit, start = self._find(extent)
            with torch.inference_mode(False):
                view = buffer[: extent.nbytes]
                unit.copy(start, torch.frombuffer(view, dtype=torch.uint8))
        handle.done()
        return handle

    def statistics(self) -> ReaderStatistics:
        return self._below.statistics()

    def close(self) -> None:
        """Does nothing: `below` stays with its owner."""

    def _find(self, extent: Extent) -> tuple[Gathered, int]:
        with self._lock:
            for unit in self._there:
                start = unit.plan.find(extent)
                if start is not None:
                    return unit, start
        raise AssertionError(f"{extent} was not gathered")

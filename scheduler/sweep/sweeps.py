"""The sweeps over one model: the open ones, and the counters of the closed ones."""

from ...io.merging import merged
from .sweep import Sweep, SweepCounters


class Sweeps:
    """Keeps the open sweeps, so that they are closed with the model."""

    def __init__(self) -> None:
        self._open: list[Sweep] = []
        self._before = SweepCounters()

    def __len__(self) -> int:
        return len(self._open)

    def add(self, sweep: Sweep) -> None:
        for other in [other for other in self._open if other.is_closed]:
            self._before = merged([self._before, other.counters()])
            self._open.remove(other)
        self._open.append(sweep)

    def counters(self) -> SweepCounters:
        """The counters of all sweeps since the model was loaded."""
        before, now_open = self._before, list(self._open)  # others may open one
        return merged([before, *(sweep.counters() for sweep in now_open)])

    def close(self) -> None:
        for sweep in self._open:
            sweep.close()

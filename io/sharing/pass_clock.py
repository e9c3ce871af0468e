"""Measures what a pass of one process was made of. Pure: times are given."""

from enum import Enum, auto

from .patience import PassTimes


class Mode(Enum):
    """What a process does at one time."""

    BUSY = auto()
    IDLE = auto()
    """It wants nothing."""
    WAITING = auto()
    """It waits for others to come."""


class PassClock:
    """Times are in seconds; counts are bytes that all processes have read, and have
    taken from others."""

    def __init__(self, now: float) -> None:
        self._mode, self._since = Mode.BUSY, now
        self._seconds = dict.fromkeys(Mode, 0.0)
        self._counts = (0, 0)

    def enter(self, mode: Mode, now: float) -> float:
        """From `now` on, the process is in `mode`. Returns the seconds that it waited
        since the last call."""
        spent = now - self._since
        waited = spent if self._mode is Mode.WAITING else 0.0
        self._seconds[self._mode] += spent
        self._mode, self._since = mode, now
        return waited

    def begin(self, counts: tuple[int, int]) -> None:
        """A pass begins now."""
        self._seconds = dict.fromkeys(Mode, 0.0)
        self._counts = counts

    def end(self, counts: tuple[int, int]) -> PassTimes:
        """The pass ends now."""
        return PassTimes(
            seconds=sum(self._seconds.values()),
            idle_seconds=self._seconds[Mode.IDLE],
            waited_seconds=self._seconds[Mode.WAITING],
            read_bytes=counts[0] - self._counts[0],
            taken_bytes=counts[1] - self._counts[1],
        )

"""The counters of a working set."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class WorkingSetStatistics:
    """Counters since the working set was made."""

    capacity_bytes: int
    peak_bytes: int
    """The largest number of bytes that slots held at one time."""
    wait_seconds: float
    """Time that computing waited for units to be loaded."""
    num_unused_loads: int
    """Number of units that were prefetched and evicted before anything read them."""
    resident_units: tuple[int, ...]

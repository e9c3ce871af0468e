"""What a working set has counted."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class WorkingSetStatistics:
    """Counters since the working set was made."""

    capacity_bytes: int
    peak_bytes: int
    """Most bytes claimed by slots at one time."""
    wait_seconds: float
    """Time for which computing stood still because a unit was not there yet."""
    num_unused_loads: int
    """Units that were prefetched and thrown out before anybody read them."""
    resident_units: tuple[int, ...]

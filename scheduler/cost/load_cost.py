"""What bringing a unit costs: its link's time, and what of the cores'. Pure."""

from .rates import Rates
from .shape import UnitCost


def load_seconds(unit: UnitCost, tier: str, rates: Rates) -> float:
    """Of one unit over its link alone, nobody computing."""
    nbytes = unit.stored_bytes if tier == "disk" else unit.nbytes
    seconds = nbytes / rates.links[tier]
    if tier == "disk":
        casting = unit.cast_bytes / (rates.cast_bytes * rates.num_cast_threads)
        seconds = max(seconds, casting)
    return seconds + rates.latency_seconds.get(tier, 0.0)


def stolen_seconds(unit: UnitCost, tier: str, rates: Rates) -> float:
    """That computing loses to it, where both share the cores."""
    if not rates.num_cores or tier != "disk":
        return 0.0
    cast = rates.calls.cast or 1.0 / (rates.cast_bytes * rates.num_cores)
    read = rates.read_cpu_seconds_per_byte / rates.num_cores
    return unit.cast_bytes * cast + unit.stored_bytes * read

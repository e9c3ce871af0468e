"""What loading a unit costs: time on its link, and time of the CPU's cores. Pure."""

from ...io.tier import Tier
from .rates import Rates
from .shape import UnitCost


def load_seconds(unit: UnitCost, tier: str, rates: Rates) -> float:
    """Seconds to load one unit from `tier` while nothing else runs."""
    nbytes = unit.stored_bytes if tier == Tier.DISK else unit.nbytes
    seconds = nbytes / rates.links[tier]
    if tier == Tier.DISK:
        casting = unit.cast_bytes / (rates.cast_bytes * rates.num_cast_threads)
        seconds = max(seconds, casting)
    return seconds + rates.latency_seconds.get(tier, 0.0)


def stolen_seconds(unit: UnitCost, tier: str, rates: Rates) -> float:
    """Seconds by which loading one unit delays computing on the same CPU cores."""
    if not rates.num_cores or tier != Tier.DISK:
        return 0.0
    cast = rates.calls.cast or 1.0 / (rates.cast_bytes * rates.num_cores)
    read = rates.read_cpu_seconds_per_byte / rates.num_cores
    return unit.cast_bytes * cast + unit.stored_bytes * read

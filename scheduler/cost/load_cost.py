"""What loading a unit costs: time on its link, and time of the CPU's cores. Pure.

`kept` is how many bytes the unit has in memory, if tiers there keep it as it is stored;
else None.
"""

from collections.abc import Hashable

from ...io.tier import Tier
from .rates import Rates
from .shape import UnitCost


class LoadCosts:
    """What loading units costs, worked out once for units alike: there are thousands of
    experts."""

    def __init__(self, rates: Rates) -> None:
        self._rates = rates
        self._found: dict[Hashable, tuple[float, float]] = {}

    def of(
        self, unit: UnitCost, tier: str, kept: int | None = None
    ) -> tuple[float, float]:
        """`load_seconds` and `stolen_seconds` of one unit."""
        key = unit.stored_bytes, unit.nbytes, unit.decoded, tier, kept
        found = self._found.get(key)
        if found is None:
            found = self._found[key] = (
                load_seconds(unit, tier, self._rates, kept),
                stolen_seconds(unit, tier, self._rates, kept),
            )
        return found


def load_seconds(
    unit: UnitCost, tier: str, rates: Rates, kept: int | None = None
) -> float:
    """Seconds to load one unit from `tier` while nothing else runs."""
    in_memory = unit.nbytes if kept is None else kept
    nbytes = unit.stored_bytes if tier == Tier.DISK else in_memory
    seconds = nbytes / rates.links[tier]
    if _is_decoded(tier, rates, kept):
        threads = rates.num_cast_threads if tier == Tier.DISK else 1
        casting = rates.cast_like(unit.decoded) / (rates.cast_bytes * threads)
        seconds = max(seconds, casting)
    return seconds + rates.latency_seconds.get(tier, 0.0)


def stolen_seconds(
    unit: UnitCost, tier: str, rates: Rates, kept: int | None = None
) -> float:
    """Seconds by which loading one unit delays computing on the same CPU cores."""
    if not rates.num_cores or not _is_decoded(tier, rates, kept):
        return 0.0
    cast = rates.calls.cast or 1.0 / (rates.cast_bytes * rates.num_cores)
    read = rates.read_cpu_seconds_per_byte / rates.num_cores
    read_bytes = unit.stored_bytes if tier == Tier.DISK else 0
    return rates.cast_like(unit.decoded) * cast + read_bytes * read


def _is_decoded(tier: str, rates: Rates, kept: int | None) -> bool:
    """Whether the CPU decodes what comes from `tier`."""
    if kept is None:
        return tier == Tier.DISK
    return not rates.crosses_host  # an accelerator decodes it itself

"""What each site waits for: its loads, those over one link as one. Pure."""

from dataclasses import dataclass

from ...io.tier import Tier
from .load_cost import LoadCosts
from .pipeline import WeightLoad
from .rates import Rates
from .shape import ModelShape, Settings, SiteCost


@dataclass(frozen=True)
class SiteLoads:
    """The loads of a pass, by site. They are the same for whatever passes through."""

    steady: tuple[tuple[WeightLoad, ...], ...]
    """Those that a site waits for in every pass."""
    staying: tuple[tuple[WeightLoad, ...], ...]
    """Those of the first pass only: of units that stay on the device, in slots of their
    own."""
    stolen: tuple[float, ...]
    """Seconds by which loads delay computing on the same cores, in every pass."""
    touching: tuple[float, ...]
    """Seconds of the first pass, which touches the working set's memory for the first
    time."""
    staying_bytes: int
    """Bytes of the device in which units stay."""


def runs(site: SiteCost, settings: Settings) -> bool:
    """Whether a site runs, and is loaded."""
    is_asked = site.makes_hidden or not settings.stops_at_hidden
    return is_asked and site.runs_for_text


def site_loads(shape: ModelShape, rates: Rates, settings: Settings) -> SiteLoads:
    """The loads of `shape`. The units of a site may be many: experts."""
    num, costs = len(shape.sites), LoadCosts(rates)
    steady = _Sums(num)
    staying = _Sums(num)
    stolen, touching = [0.0] * num, [0.0] * num
    is_running = [runs(site, settings) for site in shape.sites]
    left, staying_bytes = float(settings.capacity_bytes), 0
    for index in shape.streamed:
        unit, tier = shape.units[index], settings.placement[index]
        stays, first = tier == Tier.DEVICE, unit.sites[0]
        if stays or tier in rates.links:
            nbytes = min(left, unit.nbytes)
            touching[first] += nbytes * rates.calls.first_touch
            left -= nbytes
        if stays:
            staying_bytes += unit.nbytes
            if Tier.DISK in rates.links:
                staying.add(first, Tier.DISK, 0, costs.of(unit, Tier.DISK)[0])
        elif tier in rates.links:
            seconds, lost = costs.of(unit, tier, settings.kept_of(index))
            for site in unit.sites:
                if is_running[site]:
                    steady.add(site, tier, unit.nbytes, seconds)
                    stolen[site] += lost
    return SiteLoads(
        steady.loads(),
        staying.loads(),
        tuple(stolen),
        tuple(touching),
        staying_bytes,
    )


class _Sums:
    """Adds up the loads of each site by link."""

    def __init__(self, num_sites: int) -> None:
        self._found: list[dict[str, tuple[int, float]]] = [{} for _ in range(num_sites)]

    def add(self, site: int, link: str, nbytes: int, seconds: float) -> None:
        before = self._found[site].get(link, (0, 0.0))
        self._found[site][link] = before[0] + nbytes, before[1] + seconds

    def loads(self) -> tuple[tuple[WeightLoad, ...], ...]:
        return tuple(
            tuple(WeightLoad(link, *sums) for link, sums in of_site.items())
            for of_site in self._found
        )

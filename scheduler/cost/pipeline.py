"""When weights arrive beside computing: a pass, site by site. Pure.

One load after the other on each link, each asked for when the site `lookahead` before
its own begins, and only once the slots of those that have run are free.
"""

from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class WeightLoad:
    """What must be there before a site runs."""

    link: str
    nbytes: int
    """Of the working set that it takes."""
    seconds: float


@dataclass(frozen=True, slots=True)
class PassTime:
    """Seconds of some passes, one after the other."""

    first: float
    """Until the first pass has ended, its weights loaded from nothing."""
    steady: float
    """Of each pass after it."""
    wait: float
    """Of `steady`, how long computing stood still."""
    busy: Mapping[str, float]
    """Seconds of each pass that each link is busy."""


@dataclass(frozen=True, slots=True)
class PassCost:
    """One kind of pass, repeated."""

    time: PassTime
    compute_seconds: float
    outside_seconds: float
    """Between the passes: what micro-batches do outside of all sites."""

    @property
    def first(self) -> float:
        return self.time.first + self.outside_seconds

    @property
    def steady(self) -> float:
        return self.time.steady + self.outside_seconds

    @property
    def binds(self) -> str:
        """`compute`, or the tier at the end of the link that computing waits for."""
        if self.time.wait <= 0.02 * self.time.steady or not self.time.busy:
            return "compute"
        return max(self.time.busy, key=lambda tier: self.time.busy[tier])


def run_passes(
    compute: Sequence[float],
    loads: Sequence[Sequence[WeightLoad]],
    *,
    room_bytes: int,
    lookahead: int,
    first_compute: Sequence[float],
    first_loads: Sequence[Sequence[WeightLoad]],
) -> PassTime:
    """How long passes take whose site i computes for `compute[i]` seconds once all of
    `loads[i]` have come, into a working set with `room_bytes` for them. `first_compute`
    and `first_loads` take their places in the first pass, in which what stays is
    loaded, too."""
    clock = _Clock(room_bytes, lookahead)
    first = clock.run(first_compute, first_loads)
    second = clock.run(compute, loads)
    third = clock.run(compute, loads)
    steady = third - second if third > second else 0.0
    busy: dict[str, float] = {}
    for of_site in loads:
        for load in of_site:
            busy[load.link] = busy.get(load.link, 0.0) + load.seconds
    wait = steady - sum(compute)
    wait = wait if wait > 1e-9 * steady else 0.0  # below that it is rounding
    return PassTime(first, steady, wait, busy)


class _Clock:
    """The state between sites: when links are free, what holds room and until when."""

    def __init__(self, room_bytes: int, lookahead: int) -> None:
        self._room_bytes = room_bytes
        self._lookahead = lookahead
        self._now = 0.0
        self._link_free: dict[str, float] = {}
        self._begun: list[float] = []
        """When each site that weights are loaded for began, over all passes."""
        self._until: list[float] = []
        """When the sites that anything was loaded for had run,"""
        self._loaded: list[int] = [0]
        """and the bytes that had been loaded before each of them, and before the
        next."""

    def run(
        self, compute: Sequence[float], loads: Sequence[Sequence[WeightLoad]]
    ) -> float:
        """One more pass; returns when it has ended."""
        for seconds, needed in zip(compute, loads, strict=True):
            ready = self._now
            nbytes = 0
            for load in needed:
                ready = max(ready, self._bring(load))
                nbytes += load.nbytes
            self._now = ready + seconds
            if needed:
                self._begun.append(ready)
                self._until.append(self._now)
                self._loaded.append(self._loaded[-1] + nbytes)
        return self._now

    def _bring(self, load: WeightLoad) -> float:
        """When `load` has come."""
        ahead = len(self._begun) - self._lookahead
        asked = self._begun[ahead] if self._lookahead and ahead >= 0 else 0.0
        if not self._lookahead:
            asked = self._now
        start = max(asked, self._free_room(load.nbytes))
        start = max(start, self._link_free.get(load.link, 0.0))
        end = start + load.seconds
        self._link_free[load.link] = end
        return end

    def _free_room(self, nbytes: int) -> float:
        """When the sites that ran last have left so much room that `nbytes` fit."""
        must_go = self._loaded[-1] + nbytes - self._room_bytes
        if must_go <= 0 or not self._until:
            return 0.0
        # Of those that came first, so many make that room together.
        num = bisect_left(self._loaded, must_go)
        return self._until[min(num, len(self._until)) - 1]

"""The time of a pass in which weights are loaded while sites compute. Pure.

Each link does one load after the other. A load may start when the site `lookahead`
before its own begins, and once the slots of earlier sites leave room for it.
"""

from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class WeightLoad:
    """A transfer that must be done before a site runs."""

    link: str
    nbytes: int
    """Bytes of the working set that it takes."""
    seconds: float


@dataclass(frozen=True, slots=True)
class PassTime:
    """The times of repeated passes, in seconds."""

    first: float
    """Time of the first pass, which begins with an empty working set."""
    steady: float
    """Time of each later pass."""
    wait: float
    """How long computing waits in a later pass."""
    busy: Mapping[str, float]
    """How long each link is busy in a later pass."""


@dataclass(frozen=True, slots=True)
class PassCost:
    """The cost of one kind of pass, which is repeated."""

    time: PassTime
    compute_seconds: float
    outside_seconds: float
    """Time between the passes, which micro-batches spend outside all sites."""

    @property
    def first(self) -> float:
        return self.time.first + self.outside_seconds

    @property
    def steady(self) -> float:
        return self.time.steady + self.outside_seconds

    @property
    def binds(self) -> str:
        """`compute`, or the tier at the end of the link that is busiest."""
        if self.time.wait <= 0.02 * self.time.steady or not self.time.busy:
            return "compute"
        return max(self.time.busy, key=lambda tier: self.time.busy[tier])


@dataclass(frozen=True, slots=True)
class PassWork:
    """What one process does in one kind of pass, by site. Times are in seconds."""

    compute: Sequence[float]
    loads: Sequence[Sequence[WeightLoad]]
    first_compute: Sequence[float]
    """As `compute`, in the first pass."""
    first_loads: Sequence[Sequence[WeightLoad]]
    room_bytes: int
    """Bytes of the working set for what is loaded."""
    lookahead: int
    outside_seconds: float
    """Time that micro-batches spend outside all sites."""

    def cost(self) -> PassCost:
        """The cost of the pass where this process computes all of it."""
        time = run_passes(
            self.compute,
            self.loads,
            room_bytes=self.room_bytes,
            lookahead=self.lookahead,
            first_compute=self.first_compute,
            first_loads=self.first_loads,
        )
        return PassCost(time, sum(self.compute), self.outside_seconds)


def run_passes(
    compute: Sequence[float],
    loads: Sequence[Sequence[WeightLoad]],
    *,
    room_bytes: int,
    lookahead: int,
    first_compute: Sequence[float],
    first_loads: Sequence[Sequence[WeightLoad]],
) -> PassTime:
    """Computes how long passes take. Site i computes for `compute[i]` seconds once all
    of `loads[i]` are in the working set, which has `room_bytes` for them. The first
    pass uses `first_compute` and `first_loads` instead: it also loads the units that
    stay."""
    clock = Clock(room_bytes, lookahead)
    first = _run(clock, first_compute, first_loads)
    second = _run(clock, compute, loads)
    third = _run(clock, compute, loads)
    steady = third - second if third > second else 0.0
    wait = steady - sum(compute)
    wait = wait if wait > 1e-9 * steady else 0.0  # below that it is rounding
    return PassTime(first, steady, wait, busy_links(loads))


def busy_links(loads: Sequence[Sequence[WeightLoad]]) -> dict[str, float]:
    """How long each link is busy with `loads`, in seconds."""
    busy: dict[str, float] = {}
    for of_site in loads:
        for load in of_site:
            busy[load.link] = busy.get(load.link, 0.0) + load.seconds
    return busy


def _run(
    clock: "Clock",
    compute: Sequence[float],
    loads: Sequence[Sequence[WeightLoad]],
) -> float:
    """Runs one more pass. Returns the time at which it has ended."""
    for seconds, needed in zip(compute, loads, strict=True):
        ready = clock.open(needed)
        clock.close(needed, ready, ready + seconds)
    return clock.now


class Clock:
    """The state of one process between sites: when each link is free, and when room is
    freed."""

    def __init__(self, room_bytes: int, lookahead: int) -> None:
        self._room_bytes = room_bytes
        self._lookahead = lookahead
        self.now = 0.0
        """When the last site had run."""
        self._link_free: dict[str, float] = {}
        self._begun: list[float] = []
        """When each site with loads began to compute, over all passes."""
        self._until: list[float] = []
        """When each of these sites had run."""
        self._loaded: list[int] = [0]
        """The bytes loaded before each of these sites, and before the next one."""

    def open(self, needed: Sequence[WeightLoad]) -> float:
        """The time at which the next site may begin: its loads are there, and the site
        before has run."""
        return max([self.now, *map(self._bring, needed)])

    def close(self, needed: Sequence[WeightLoad], begun: float, until: float) -> None:
        """That site, which needed these loads, has computed from `begun` to `until`."""
        self.now = until
        if needed:
            self._begun.append(begun)
            self._until.append(until)
            nbytes = sum(load.nbytes for load in needed)
            self._loaded.append(self._loaded[-1] + nbytes)

    def _bring(self, load: WeightLoad) -> float:
        """Starts `load` as soon as possible. Returns the time at which it is done."""
        ahead = len(self._begun) - self._lookahead
        asked = self._begun[ahead] if self._lookahead and ahead >= 0 else 0.0
        if not self._lookahead:
            asked = self.now
        start = max(asked, self._free_room(load.nbytes))
        start = max(start, self._link_free.get(load.link, 0.0))
        end = start + load.seconds
        self._link_free[load.link] = end
        return end

    def _free_room(self, nbytes: int) -> float:
        """The time at which earlier sites have left enough room for `nbytes`."""
        must_go = self._loaded[-1] + nbytes - self._room_bytes
        if must_go <= 0 or not self._until:
            return 0.0
        # Slots are freed in the order in which they were loaded.
        num = bisect_left(self._loaded, must_go)
        return self._until[min(num, len(self._until)) - 1]

"""Puts times to schedules: events in the order of their times, all devices and links
together. Pure.

A device's visit is one event: nothing that happens on a link changes it once it has
begun. A transfer is one event for each link on its way.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from heapq import heappop, heappush

from .schedule import Schedule
from .simulated import Rank, SimulatedLink
from .turns import Turns


@dataclass(slots=True)
class Lane:
    """A link at work."""

    link: SimulatedLink
    free_at: float = 0.0
    kv_free_at: float = 0.0
    """When the keys and values asked for so far have passed: weights that wait let
    them by."""
    busy_seconds: float = 0.0
    moved_bytes: float = 0.0

    @property
    def idle_from(self) -> float:
        return max(self.free_at, self.kv_free_at)

    def pass_weights(self, nbytes: int, now: float) -> tuple[float, float]:
        """When `nbytes` that are asked for `now` begin and end to pass."""
        start = max(now, self.free_at)
        seconds = nbytes / self.link.bytes_per_second
        self.free_at = start + seconds
        self.busy_seconds += seconds
        self.moved_bytes += nbytes
        return start, self.free_at

    def pass_kv(self, seconds: float, nbytes: float, asked: float, now: float) -> float:
        """When keys and values that take `seconds` and are asked for at `asked`, from
        `now` on, have passed."""
        self.kv_free_at = max(asked, self.kv_free_at) + seconds
        self.free_at = max(now, self.free_at) + seconds
        self.busy_seconds += seconds
        self.moved_bytes += nbytes
        return self.kv_free_at


@dataclass(slots=True)
class RankProgress:
    """How far one device is, and when it was where."""

    rank: Rank
    schedule: Schedule
    turns: Turns
    opened: list[float] = field(default_factory=list)
    began: list[float] = field(default_factory=list)
    ended: list[float] = field(default_factory=list)
    """Of each visit: its unit was there, its first micro-batch began, its last one
    ended."""
    arrived: list[float] = field(default_factory=list)
    """Of each load; infinity while it is under way."""
    asked: int = 0
    """Loads that have been asked for, of `queue`."""
    queue: list[tuple[int, int]] = field(default_factory=list)
    """(tick, load), in the order in which they can begin."""
    kv_there_at: float = 0.0
    """When the first micro-batch of the next visit has its keys and values."""
    written_at: list[float] = field(default_factory=list)
    """By unit, when what its last visit wrote back has arrived."""


@dataclass(frozen=True, slots=True)
class SimulatedTransfer:
    """Weights that passed over one link."""

    rank: int
    link: str
    unit: int
    begin: float
    end: float


class EventLoop:
    """Runs `walks` over `links` until all are at their ends."""

    def __init__(
        self, walks: Sequence[RankProgress], links: Mapping[str, SimulatedLink]
    ) -> None:
        self.walks = walks
        self.lanes = {name: Lane(link) for name, link in links.items()}
        self.transfers: list[SimulatedTransfer] = []
        self.num_events = 0
        self._num_given = 0
        self._events: list[tuple[float, int, int, int, int]] = []
        """(time, a number that keeps their order, rank, load or -1, hop)."""

    def run(self) -> None:
        for number, walk in enumerate(self.walks):
            self._begin(number, walk)
        while self._events:
            now, _, number, load, hop = heappop(self._events)
            self.num_events += 1
            if load < 0:
                self._end_visit(number, now)
            else:
                self._move(number, load, hop, now)

    def _begin(self, number: int, walk: RankProgress) -> None:
        walk.arrived = [float("inf")] * len(walk.schedule.loads)
        walk.written_at = [0.0] * len(walk.rank.sizes)
        walk.queue = _queue(walk)
        self._fetch_first_kv(walk, 0, 0.0, 0.0)
        self._ask(number, 0, 0.0)
        self._open(number, 0.0)

    def _ask(self, number: int, tick: int, now: float) -> None:
        """Loads that can begin at `tick` set out."""
        walk = self.walks[number]
        while walk.asked < len(walk.queue) and walk.queue[walk.asked][0] <= tick:
            load = walk.queue[walk.asked][1]
            walk.asked += 1
            self._move(number, load, 0, now)

    def _move(self, number: int, load: int, hop: int, now: float) -> None:
        """The unit of `load` has come to link `hop` of its way, or to its end."""
        walk = self.walks[number]
        unit = walk.schedule.loads[load].unit
        route = walk.rank.routes.get(walk.rank.tiers[unit], ())
        if hop == len(route):
            walk.arrived[load] = now
            self._open(number, now)
            return
        lane = self.lanes[route[hop]]
        begin, end = lane.pass_weights(walk.rank.sizes[unit], now)
        self.transfers.append(SimulatedTransfer(number, route[hop], unit, begin, end))
        self._at(end + lane.link.latency_seconds, number, load, hop + 1)

    def _open(self, number: int, now: float) -> None:
        """The next visit begins, if its turn has come and its unit is there."""
        walk = self.walks[number]
        visit = len(walk.opened)
        is_turn = visit == len(walk.ended) and visit < walk.schedule.num_visits
        if not is_turn or walk.arrived[walk.schedule.needs[visit]] > now:
            return
        walk.opened.append(now)
        self._ask(number, 2 * visit + 1, now)
        self._at(self._compute(walk, visit, now), number, -1, 0)

    def _compute(self, walk: RankProgress, visit: int, now: float) -> float:
        """When visit `visit`, opened `now`, ends; what moves for its micro-batches sets
        out."""
        turns, kv = walk.turns, walk.rank.kv
        at = divmod(visit, len(walk.rank.sizes))
        begin = max(now, walk.kv_there_at)
        walk.began.append(begin)
        last = begin + float(turns.to_last[at])
        if kv is not None:
            way_in, way_out = self.lanes[kv.link_in], self.lanes[kv.link_out]
            rest = way_in.pass_kv(turns.rest_in[at], turns.bytes_in[at], begin, now)
            last = max(last, rest)
            end = last + float(turns.last[at])
            if turns.out[at]:
                out = way_out.pass_kv(turns.out[at], turns.bytes_out[at], begin, now)
                walk.written_at[at[1]] = max(out, end) + way_out.link.latency_seconds
            self._fetch_first_kv(walk, visit + 1, last, now)
        return last + float(turns.last[at])

    def _fetch_first_kv(
        self, walk: RankProgress, visit: int, asked: float, now: float
    ) -> None:
        kv, at = walk.rank.kv, divmod(visit, len(walk.rank.sizes))
        if kv is None or visit == walk.schedule.num_visits:
            return
        if seconds := float(walk.turns.first_in[at]):
            asked = max(asked, walk.written_at[at[1]])
            passed = self.lanes[kv.link_in].pass_kv(seconds, 0.0, asked, now)
            walk.kv_there_at = passed + float(walk.turns.first_late[at])

    def _end_visit(self, number: int, now: float) -> None:
        walk = self.walks[number]
        walk.ended.append(now)
        self._ask(number, 2 * len(walk.ended), now)
        self._open(number, now)

    def _at(self, time: float, number: int, load: int, hop: int) -> None:
        self._num_given += 1  # who was first at a time comes first
        heappush(self._events, (time, self._num_given, number, load, hop))


def _queue(walk: RankProgress) -> list[tuple[int, int]]:
    """Loads by the tick at which they can begin. On one link none overtakes another."""
    latest: dict[str, int] = {}
    found = []
    for index, load in enumerate(walk.schedule.loads):
        tick = 2 * (load.after + 1) if walk.rank.runs_ahead else load.tick
        route = walk.rank.routes.get(walk.rank.tiers[load.unit], ())
        if route:
            tick = latest[route[0]] = max(tick, latest.get(route[0], 0))
        found.append((tick, index))
    return sorted(found)

"""Adds times to schedules by running events in order of time, for all devices and links
together. Pure.

A visit of a device is one event: once it has begun, no transfer can change its length.
A transfer is one event for each link on its route.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from heapq import heappop, heappush

from .schedule import Schedule
from .simulated import Rank, SimulatedLink
from .turns import Turns


@dataclass(slots=True)
class Lane:
    """The state of one link."""

    link: SimulatedLink
    free_at: float = 0.0
    kv_free_at: float = 0.0
    """When the keys and values requested so far have passed; they overtake weights."""
    busy_seconds: float = 0.0
    moved_bytes: float = 0.0

    @property
    def idle_from(self) -> float:
        return max(self.free_at, self.kv_free_at)

    def pass_weights(self, nbytes: int, now: float) -> tuple[float, float]:
        """Returns when a transfer of `nbytes`, requested `now`, begins and ends."""
        start = max(now, self.free_at)
        seconds = nbytes / self.link.bytes_per_second
        self.free_at = start + seconds
        self.busy_seconds += seconds
        self.moved_bytes += nbytes
        return start, self.free_at

    def pass_kv(self, seconds: float, nbytes: float, asked: float, now: float) -> float:
        """Returns when keys and values have passed that take `seconds` and are asked
        for at time `asked`, not before `now`."""
        self.kv_free_at = max(asked, self.kv_free_at) + seconds
        self.free_at = max(now, self.free_at) + seconds
        self.busy_seconds += seconds
        self.moved_bytes += nbytes
        return self.kv_free_at


@dataclass(slots=True)
class RankProgress:
    """How far one device has come, and the times of its visits and loads."""

    rank: Rank
    schedule: Schedule
    turns: Turns
    opened: list[float] = field(default_factory=list)
    began: list[float] = field(default_factory=list)
    ended: list[float] = field(default_factory=list)
    """By visit: the time at which its unit was loaded (`opened`), its first micro-batch
    began, its last one ended."""
    arrived: list[float] = field(default_factory=list)
    """By load: the time of its end; infinity while it is under way."""
    asked: int = 0
    """How many loads of `queue` have been requested."""
    queue: list[tuple[int, int]] = field(default_factory=list)
    """(tick, load), in the order in which loads can begin."""
    kv_there_at: float = 0.0
    """When the first micro-batch of the next visit has its keys and values."""
    written_at: list[float] = field(default_factory=list)
    """By unit: when the keys and values that its last visit wrote have arrived."""


@dataclass(frozen=True, slots=True)
class SimulatedTransfer:
    """One transfer of weights over one link."""

    rank: int
    link: str
    unit: int
    begin: float
    end: float


class EventLoop:
    """Runs all `walks` (devices) over `links` until each has ended its last visit."""

    def __init__(
        self, walks: Sequence[RankProgress], links: Mapping[str, SimulatedLink]
    ) -> None:
        self.walks = walks
        self.lanes = {name: Lane(link) for name, link in links.items()}
        self.transfers: list[SimulatedTransfer] = []
        self.num_events = 0
        self._num_given = 0
        self._events: list[tuple[float, int, int, int, int]] = []
        """(time, serial number, rank, load or -1 for the end of a visit, hop)."""

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
        """Starts the loads that can begin at `tick`."""
        walk = self.walks[number]
        while walk.asked < len(walk.queue) and walk.queue[walk.asked][0] <= tick:
            load = walk.queue[walk.asked][1]
            walk.asked += 1
            self._move(number, load, 0, now)

    def _move(self, number: int, load: int, hop: int, now: float) -> None:
        """Starts the transfer of `load` over link `hop` of its route, or ends it after
        the last link."""
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
        """Begins the next visit, if the one before has ended and its unit is loaded."""
        walk = self.walks[number]
        visit = len(walk.opened)
        is_turn = visit == len(walk.ended) and visit < walk.schedule.num_visits
        if not is_turn or walk.arrived[walk.schedule.needs[visit]] > now:
            return
        walk.opened.append(now)
        self._ask(number, 2 * visit + 1, now)
        self._at(self._compute(walk, visit, now), number, -1, 0)

    def _compute(self, walk: RankProgress, visit: int, now: float) -> float:
        """Returns when visit `visit`, opened `now`, ends. Starts the transfers of keys
        and values of its micro-batches."""
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
        self._num_given += 1  # events of equal time run in the order of this number
        heappush(self._events, (time, self._num_given, number, load, hop))


def _queue(walk: RankProgress) -> list[tuple[int, int]]:
    """The loads, sorted by the tick at which they can begin. None overtakes another on
    the same link."""
    latest: dict[str, int] = {}
    queue = []
    for index, load in enumerate(walk.schedule.loads):
        tick = 2 * (load.after + 1) if walk.rank.runs_ahead else load.tick
        route = walk.rank.routes.get(walk.rank.tiers[load.unit], ())
        if route:
            tick = latest[route[0]] = max(tick, latest.get(route[0], 0))
        queue.append((tick, index))
    return sorted(queue)

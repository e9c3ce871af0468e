"""Simulates sweeps: many micro-batches, layer-major, over weights that are brought in.

    rank = Rank(
        sizes=[100 << 20] * 32,             # bytes of each unit
        tiers=["device", "host"] * 16,      # every second one is brought in
        routes={"host": ["pcie"]},
        capacity=(16 + 3) * (100 << 20),    # what stays, and three slots
        compute_seconds=1e-3,               # of a micro-batch in a unit
    )
    found = simulate(
        [rank], {"pcie": SimulatedLink(bytes_per_second=25e9)},
        num_micro_batches=16, num_passes=4,
    )
    found.steady_pass_seconds, found.link_busy_seconds, found.visits

Which unit goes into which slot when is decided by the code that decides it in a real
sweep (`rehearsal`), times are put to it by events (`event_loop`), and all micro-batches
of a visit are one event (`turns`). Several devices are several ranks; a link that two
of them name is shared.

What is left out: the time that Python takes, what copies take from who computes on a
CPU, and products that are shared between micro-batches (give their time instead). On a
link that weights and keys and values share, the latter go first, and what is under way
is not slowed by them.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .event_loop import EventLoop, RankProgress, SimulatedTransfer
from .rehearsal import Passes, rehearse
from .schedule import Schedule
from .simulated import STAYS, Floats, Rank, SimulatedLink
from .turns import turns

Ints = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Visits:
    """When each device computed what: (visits,) each, rank by rank."""

    rank: Ints
    pass_index: Ints
    unit: Ints
    opened: Floats
    """Seconds at which its weights were there, and it was its turn."""
    began: Floats
    """Its first micro-batch had its keys and values."""
    ended: Floats


@dataclass(frozen=True, slots=True)
class Simulation:
    """What came out. Seconds from the start."""

    passes: Passes
    makespan_seconds: float
    """The last visit has ended."""
    drained_seconds: float
    """And every link is idle."""
    pass_ends: Floats
    """When each device has ended each pass: (ranks, passes)."""
    compute_seconds: Floats
    weight_wait_seconds: Floats
    """For which a device stood still because a unit was not there: (ranks,)."""
    kv_wait_seconds: Floats
    """The same because of keys and values."""
    link_busy_seconds: Mapping[str, float]
    link_bytes: Mapping[str, float]
    visits: Visits
    transfers: Sequence[SimulatedTransfer]
    """Weights over links, in the order in which they were asked for."""
    num_events: int

    @property
    def steady_pass_seconds(self) -> float:
        """Of a pass of the slowest device, once those before are over or, without
        them, the first one, which has to learn what follows what."""
        ends, skipped = self.pass_ends, max(self.passes.before, 1)
        if self.passes.total < 2:
            raise ValueError("one pass alone is not steady: simulate two at least")
        spent = ends[:, -1] - ends[:, skipped - 1]
        return float(spent.max() / (self.passes.total - skipped))


def simulate(
    ranks: Sequence[Rank],
    links: Mapping[str, SimulatedLink],
    *,
    num_micro_batches: int,
    num_passes: int,
    passes_each: int | None = None,
    passes_before: int = 0,
) -> Simulation:
    """All `ranks` make `num_passes` passes over their own units, `num_micro_batches`
    through each, of which others take the places after `passes_each` (1 when scoring;
    None: all are made by the same, as when generating). `passes_before` are those of
    a sweep before, in which others have learnt what follows what.

    Raises DoesNotFitError where a working set holds too little, and ValueError where a
    link is not there."""
    passes = Passes(num_passes, passes_each or num_passes, passes_before)
    named = {link for rank in ranks for way in rank.routes.values() for link in way}
    named |= {n for r in ranks if r.kv for n in (r.kv.link_in, r.kv.link_out)}
    if named - set(links):
        raise ValueError(f"there is no link {', '.join(sorted(named - set(links)))}")
    schedules: dict[object, Schedule] = {}
    walks = [_walk(rank, links, num_micro_batches, passes, schedules) for rank in ranks]
    loop = EventLoop(walks, links)
    loop.run()
    return _result(loop, passes)


def _walk(
    rank: Rank,
    links: Mapping[str, SimulatedLink],
    num_micro_batches: int,
    passes: Passes,
    schedules: dict[object, Schedule],
) -> RankProgress:
    staying = frozenset(u for u, tier in enumerate(rank.tiers) if tier == STAYS)
    # Devices that are alike decide alike.
    key = (tuple(rank.sizes), staying, rank.capacity, rank.lookahead)
    if key not in schedules:
        schedules[key] = rehearse(
            rank.sizes,
            staying=staying,
            capacity=rank.capacity,
            lookahead=rank.lookahead,
            passes=passes,
        )
    kv = rank.kv
    found = turns(
        rank.compute_seconds,
        (passes.total, len(rank.sizes), num_micro_batches),
        kv=kv,
        link_in=None if kv is None else links[kv.link_in],
        link_out=None if kv is None else links[kv.link_out],
    )
    return RankProgress(rank, schedules[key], found)


def _result(loop: EventLoop, passes: Passes) -> Simulation:
    visits = [_visits(number, walk) for number, walk in enumerate(loop.walks)]
    ends = np.array([walk.ended for walk in loop.walks])
    num_ranks = len(loop.walks)
    makespan = float(ends.max())
    lanes = loop.lanes
    compute = np.array([walk.turns.compute.sum() for walk in loop.walks])
    waits = np.array([(v.opened - _from(v)).sum() for v in visits])
    inside = np.array([(v.ended - v.opened).sum() for v in visits])
    return Simulation(
        passes=passes,
        makespan_seconds=makespan,
        drained_seconds=max([makespan, *(lane.idle_from for lane in lanes.values())]),
        pass_ends=ends.reshape(num_ranks, passes.total, -1)[:, :, -1],
        compute_seconds=compute,
        weight_wait_seconds=waits,
        kv_wait_seconds=np.maximum(inside - compute, 0.0),
        link_busy_seconds={name: lane.busy_seconds for name, lane in lanes.items()},
        link_bytes={name: lane.moved_bytes for name, lane in lanes.items()},
        visits=Visits(
            *(
                np.concatenate([getattr(v, name) for v in visits])
                for name in Visits.__dataclass_fields__
            )
        ),
        transfers=loop.transfers,
        num_events=loop.num_events,
    )


def _visits(number: int, walk: RankProgress) -> Visits:
    index = np.arange(walk.schedule.num_visits)
    at, unit = np.divmod(index, len(walk.rank.sizes))
    times = (np.array(t) for t in (walk.opened, walk.began, walk.ended))
    return Visits(np.full_like(index, number), at, unit, *times)


def _from(visits: Visits) -> Floats:
    """When each visit's turn came: the one before it had ended."""
    return np.concatenate([[0.0], visits.ended[:-1]])

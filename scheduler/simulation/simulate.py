"""Simulates sweeps: many micro-batches, layer by layer, over weights that are loaded.

    rank = Rank(
        sizes=[100 << 20] * 32,             # bytes of each unit
        tiers=["device", "host"] * 16,      # every second one is streamed
        routes={"host": ["pcie"]},
        capacity=(16 + 3) * (100 << 20),    # units that stay, and three slots
        compute_seconds=1e-3,               # for a micro-batch in a unit
    )
    simulation = simulate(
        [rank], {"pcie": SimulatedLink(bytes_per_second=25e9)},
        num_micro_batches=16, num_passes=4,
    )
    simulation.steady_pass_seconds, simulation.link_busy_seconds, simulation.visits

The code of a real sweep decides which unit is loaded into which slot (`rehearsal`). An
event loop adds times (`event_loop`). All micro-batches of a visit are one event
(`turns`). Each device is a rank; a link that two ranks name is shared by them.

Not simulated: the time of Python code, the CPU time of copies, and products that are
joined between micro-batches (pass the joined time instead). On a link that carries both
weights and keys and values, the latter go first; a transfer under way is not slowed.
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
    """When each device computed each unit. Arrays of shape (visits,), rank by rank."""

    rank: Ints
    pass_index: Ints
    unit: Ints
    opened: Floats
    """Time at which the visit before had ended and its weights were loaded."""
    began: Floats
    """Time at which its first micro-batch also had its keys and values."""
    ended: Floats


@dataclass(frozen=True, slots=True)
class Simulation:
    """The result of a simulation. All times are seconds from the start."""

    passes: Passes
    makespan_seconds: float
    """When the last visit has ended."""
    drained_seconds: float
    """When, in addition, every link is idle."""
    pass_ends: Floats
    """When each device has ended each pass: (ranks, passes)."""
    compute_seconds: Floats
    weight_wait_seconds: Floats
    """How long each device waited for units: (ranks,)."""
    kv_wait_seconds: Floats
    """How long each device waited for keys and values: (ranks,)."""
    link_busy_seconds: Mapping[str, float]
    link_bytes: Mapping[str, float]
    visits: Visits
    transfers: Sequence[SimulatedTransfer]
    """Transfers of weights, in the order in which they were requested."""
    num_events: int

    @property
    def steady_pass_seconds(self) -> float:
        """The mean time of a pass on the slowest device. Left out are the passes of the
        sweep before or, without one, the first pass, in which the order is learnt."""
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
    """Simulates `num_passes` passes of all `ranks` over their own units, each with
    `num_micro_batches`. After `passes_each` passes, new micro-batches take the places
    of the old ones (1 when scoring; None: never, as when generating). An earlier sweep
    made `passes_before` passes, from which the order of sites is known.

    Raises DoesNotFitError if a working set is too small, and ValueError for a link that
    is not given."""
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
    # Equal devices make equal decisions.
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
    visit_lengths = turns(
        rank.compute_seconds,
        (passes.total, len(rank.sizes), num_micro_batches),
        kv=kv,
        link_in=None if kv is None else links[kv.link_in],
        link_out=None if kv is None else links[kv.link_out],
    )
    return RankProgress(rank, schedules[key], visit_lengths)


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
    """When the visit before each visit had ended."""
    return np.concatenate([[0.0], visits.ended[:-1]])

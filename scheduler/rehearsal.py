"""Finds out what a sweep loads when, by running its own decisions with nothing behind
them: the real working set, doors and order, with loads that end at once.

What is decided depends on what came before, never on how long it took: so the decisions
can be had first, and times put to them afterwards.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

from ..io.event import Event
from .doors import Doors, Site
from .order import Order
from .schedule import Schedule, ScheduledLoad
from .working_set import WorkingSet


def rehearse(
    sizes: Sequence[int],
    *,
    staying: frozenset[int],
    capacity: int,
    lookahead: int,
    num_passes: int,
) -> Schedule:
    """What a sweep over units of `sizes` bytes loads, of which those `staying` have a
    place of their own in a working set of `capacity` bytes. Raises DoesNotFitError."""
    num = len(sizes)
    stage = _Stage()
    working_set = WorkingSet(
        sizes,
        names=[f"unit {unit}" for unit in range(num)],
        capacity=capacity,
        load=stage.load,
        mark=stage.mark,
        needed=frozenset(range(num)),
        staying=sorted(staying),
    )
    sites = [Site(f"unit {unit}", (unit,)) for unit in range(num)]
    doors = Doors(sites, working_set, bind=lambda *_: None, unbind=lambda _: None)
    order = Order(num)
    doors.expect(range(min(1 + lookahead, num)))  # as an engine starts
    needs = []
    for visit in range(num * num_passes):
        site = visit % num
        if visit == 0:
            order.observe(None, site, is_repeat=False)
        stage.tick, stage.visit = 2 * visit, visit
        doors.enter(site)
        needs.append(stage.brought[site])
        stage.tick = 2 * visit + 1
        doors.expect(order.upcoming(site, {site}, lookahead, doors.stays))
        if visit + 1 < num * num_passes:  # all of them come to the next site meanwhile
            order.observe(site, (site + 1) % num, is_repeat=visit + 1 >= num)
        doors.leave(site)
    return Schedule(num * num_passes, tuple(stage.loads), tuple(needs))


@dataclass(frozen=True, slots=True)
class _End:
    """The point at which a visit is over."""

    visit: int

    def wait(self) -> None:
        """Nothing runs here."""


class _Loaded:
    """A load that is there as soon as it is asked for."""

    ready = None

    def wait(self) -> None:
        """It is there."""

    def wait_quietly(self) -> None:
        """It is there."""


@dataclass(slots=True)
class _Stage:
    """Notes what is asked for, in the part of the tiers and of the device."""

    loads: list[ScheduledLoad] = field(default_factory=list)
    brought: dict[int, int] = field(default_factory=dict)
    """By unit, the load that brought it last."""
    tick: int = 0
    visit: int = -1

    def load(self, unit: int, offset: int, after: tuple[Event, ...]) -> _Loaded:
        visits = [event.visit for event in after if isinstance(event, _End)]
        self.brought[unit] = len(self.loads)
        self.loads.append(ScheduledLoad(unit, self.tick, max(visits, default=-1)))
        return _Loaded()

    def mark(self) -> _End:
        return _End(self.visit)

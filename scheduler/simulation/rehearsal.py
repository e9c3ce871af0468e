"""Finds out what a sweep loads when, by running its own decisions with nothing behind
them: the real working set, doors and order, with loads that end at once.

What is decided depends on what came before, never on how long it took: so the decisions
can be had first, and times put to them afterwards.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

from ...io.event import Event
from ..order import Order
from ..slots.doors import Doors, Site
from ..slots.working_set import WorkingSet
from .schedule import Schedule, ScheduledLoad


@dataclass(frozen=True, slots=True)
class Passes:
    """Who makes the passes of a sweep, over weights that it may know already."""

    num: int
    """Of the sweep itself."""
    each: int
    """That a micro-batch makes before another one takes its place: one when scoring,
    as many as there are tokens when generating."""
    before: int = 0
    """Of a sweep before this one, which nobody knew that this one would follow."""

    def __post_init__(self) -> None:
        if self.num < 1 or self.each < 1 or self.before < 0:
            raise ValueError(f"{self}: at least one pass, of at least one each")

    @property
    def total(self) -> int:
        return self.before + self.num

    def is_last(self, number: int) -> bool:
        """Whether pass `number` is the last one of those who make it."""
        at = number - self.before
        return at == -1 or (at >= 0 and (at + 1) % self.each == 0) or at == self.num - 1

    def others_follow(self, number: int) -> bool:
        """Whether it is known in pass `number` that others will take their places."""
        at = number - self.before
        return at >= 0 and (at // self.each + 1) * self.each < self.num


def rehearse(
    sizes: Sequence[int],
    *,
    staying: frozenset[int],
    capacity: int,
    lookahead: int,
    passes: Passes,
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
    doors.prefetch_sites(range(min(1 + lookahead, num)))  # as an engine starts
    needs = []
    order.observe(None, 0, is_repeat=False)
    for visit in range(num * passes.total):
        number, site = divmod(visit, num)
        stage.tick, stage.visit = 2 * visit, visit
        doors.enter(site)
        needs.append(stage.brought[site])
        stage.tick = 2 * visit + 1
        others = {0} if passes.others_follow(number) else set()
        doors.prefetch_sites(
            order.upcoming(site, {site} | others, lookahead, doors.stays)
        )
        _go_on(order, site, num, is_last=passes.is_last(number))
        doors.leave(site)
    return Schedule(num * passes.total, tuple(stage.loads), tuple(needs))


def _go_on(order: Order, site: int, num: int, *, is_last: bool) -> None:
    """All micro-batches come to the next site, or others to the first one."""
    if site + 1 < num:
        order.observe(site, site + 1, is_repeat=False)
    elif is_last:
        order.observe_end(site)
        order.observe(None, 0, is_repeat=False)
    else:
        order.observe(site, 0, is_repeat=True)


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

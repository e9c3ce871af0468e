"""Finds out what a sweep loads when, by running the real working set, sites and order
with loads that finish at once and move no data.

These decisions depend on the order of events and never on their times. So they can be
computed first, and times are added afterwards.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

from ...io.event import Event
from ..order import Order
from ..slots.open_sites import OpenSites, Site
from ..slots.working_set import WorkingSet
from .schedule import Schedule, ScheduledLoad


@dataclass(frozen=True, slots=True)
class Passes:
    """The passes of a sweep, and those of an earlier sweep."""

    num: int
    """Number of passes of the sweep itself."""
    each: int
    """Passes that a micro-batch makes before a new one takes its place: one when
    scoring, one per token when generating."""
    before: int = 0
    """Passes of an earlier sweep, which did not know that this one would follow."""

    def __post_init__(self) -> None:
        if self.num < 1 or self.each < 1 or self.before < 0:
            raise ValueError(f"{self}: at least one pass, of at least one each")

    @property
    def total(self) -> int:
        return self.before + self.num

    def is_last(self, number: int) -> bool:
        """Whether pass `number` is the last one of its micro-batches."""
        at = number - self.before
        return at == -1 or (at >= 0 and (at + 1) % self.each == 0) or at == self.num - 1

    def others_follow(self, number: int) -> bool:
        """Whether it is known in pass `number` that new micro-batches will follow."""
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
    """Returns what a sweep over units of `sizes` bytes loads. Each of the `staying` has
    its own slot in the working set of `capacity` bytes. Raises DoesNotFitError."""
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
    open_sites = OpenSites(
        sites, working_set, bind=lambda *_: None, unbind=lambda _: None
    )
    order = Order(num)
    open_sites.prefetch_sites(range(min(1 + lookahead, num)))  # as an engine starts
    needs = []
    order.observe(None, 0, is_repeat=False)
    for visit in range(num * passes.total):
        number, site = divmod(visit, num)
        stage.tick, stage.visit = 2 * visit, visit
        open_sites.enter(site)
        needs.append(stage.brought[site])
        stage.tick = 2 * visit + 1
        others = {0} if passes.others_follow(number) else set()
        open_sites.prefetch_sites(
            order.upcoming(site, {site} | others, lookahead, open_sites.stays)
        )
        _go_on(order, site, num, is_last=passes.is_last(number))
        open_sites.leave(site)
    return Schedule(num * passes.total, tuple(stage.loads), tuple(needs))


def _go_on(order: Order, site: int, num: int, *, is_last: bool) -> None:
    """All micro-batches reach the next site, or new ones reach the first site."""
    if site + 1 < num:
        order.observe(site, site + 1, is_repeat=False)
    elif is_last:
        order.observe_end(site)
        order.observe(None, 0, is_repeat=False)
    else:
        order.observe(site, 0, is_repeat=True)


@dataclass(frozen=True, slots=True)
class _End:
    """The event that a visit has ended."""

    visit: int

    def wait(self) -> None:
        """Returns at once: no device works here."""


class _Loaded:
    """A load that has finished at once."""

    ready = None

    def wait(self) -> None:
        """Returns at once."""

    def wait_quietly(self) -> None:
        """Returns at once."""


@dataclass(slots=True)
class _Stage:
    """Stands in for the tiers and the device, and records the loads."""

    loads: list[ScheduledLoad] = field(default_factory=list)
    brought: dict[int, int] = field(default_factory=dict)
    """By unit: the index of its last load."""
    tick: int = 0
    visit: int = -1

    def load(self, unit: int, offset: int, after: tuple[Event, ...]) -> _Loaded:
        visits = [event.visit for event in after if isinstance(event, _End)]
        self.brought[unit] = len(self.loads)
        self.loads.append(ScheduledLoad(unit, self.tick, max(visits, default=-1)))
        return _Loaded()

    def mark(self) -> _End:
        return _End(self.visit)

"""Opens and closes the sites of a model: a site is open while its units are loaded and
bound to its parameters.

A site is a module that runs as a whole (a block, an embedding, a head). It needs one
unit of weights, or several where it shares weights with other sites.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from ...io.errors import PenstockError
from ..order import Order
from .routing import Routing
from .working_set import WorkingSet


@dataclass(frozen=True, slots=True)
class Site:
    """A module that micro-batches wait for, and the units of weights that it needs."""

    name: str
    units: tuple[int, ...]


class OpenSites:
    """Counts the callers inside each site, and keeps the site's units in their slots
    until the last caller has left.

    `bind(site, offsets)` points the site's parameters at its units, which lie at
    `offsets` in the arena. `unbind(site)` undoes that before the bytes are reused. Both
    raise PenstockError if user code has written to the weights; the units are then
    loaded again. All methods are called by the thread that has the turn.

    A window of `routing` is a site without units: who is inside acquires those pieces
    that it needs.
    """

    def __init__(
        self,
        sites: Sequence[Site],
        working_set: WorkingSet,
        *,
        bind: Callable[[int, tuple[int, ...]], None],
        unbind: Callable[[int], None],
        routing: Routing | None = None,
    ) -> None:
        self.sites = sites
        self.routing = routing or Routing((), ())
        self._working_set = working_set
        self._bind = bind
        self._unbind = unbind
        self._inside = [0] * len(sites)
        self._offsets: list[tuple[int, ...]] = [()] * len(sites)
        users: dict[int, set[int]] = {}
        for index, site in enumerate(sites):
            for unit in site.units:
                users.setdefault(unit, set()).add(index)
        self._sharing = [
            frozenset().union(*(users[unit] for unit in site.units)) - {index}
            for index, site in enumerate(sites)
        ]
        working_set.need_together(site.units for site in sites)

    @property
    def wait_seconds(self) -> float:
        return self._working_set.wait_seconds

    def is_open(self, site: int) -> bool:
        return self._inside[site] > 0

    def enter(self, site: int) -> None:
        """Counts one more caller inside `site`. The first one waits until the site's
        units are loaded, and binds them."""
        if self._inside[site] == 0:
            units = self.sites[site].units
            offsets = self._working_set.acquire_together(units)
            try:
                self._bind(site, offsets)
            except BaseException as error:
                self._release(units, spoilt=isinstance(error, PenstockError))
                raise
            self._offsets[site] = offsets
        self._inside[site] += 1

    def bind_again(self, site: int) -> None:
        """Binds the units of an open `site` once more: the grad mode has changed."""
        self._bind(site, self._offsets[site])

    def leave(self, site: int) -> None:
        """Counts one caller less. After the last one the site is closed: its units are
        unbound and may be overwritten."""
        self._inside[site] -= 1
        if self._inside[site] == 0:
            spoilt = False
            try:
                self._unbind(site)
                for other in self._sharing[site]:
                    if self._inside[other]:  # it still needs the shared units
                        self._bind(other, self._offsets[other])
            except PenstockError:
                spoilt = True
                raise
            finally:
                self._release(self.sites[site].units, spoilt=spoilt)

    @contextmanager
    def aside(self, site: int | None) -> Iterator[None]:
        """Closes `site` meanwhile, so that its bytes can be used, if it is open for a
        sweep and nobody is inside of it."""
        may_close = site is not None and self._inside[site] == 1
        if site is not None and may_close:
            self.leave(site)
        try:
            yield
        finally:
            if site is not None and may_close:
                self.enter(site)

    def stays(self, site: int) -> bool:
        """Whether all units of `site` are loaded and are never evicted."""
        return all(self._working_set.stays(unit) for unit in self._units_of(site))

    def prefetch_sites(self, sites: Iterable[int], extra: Iterable[int] = ()) -> None:
        """Starts loading the units of `sites`, which are given in the order in which
        they will run, and then those `extra` units that are worth it."""
        units = [unit for site in sites for unit in self._units_of(site)]
        self._working_set.prefetch(units, extra)

    def prefetch_from(
        self, site: int, order: Order, waiting: set[int], depth: int
    ) -> None:
        """Starts loading the units of the `depth` sites that follow `site` in `order`,
        as far as is known, and those of `site`, if it is a window."""
        routing = self.routing
        now: list[int] = []
        extra: tuple[int, ...] = ()
        if routing.is_window(site):
            routing.open(site, self._working_set.holds)
            now, extra = [site], routing.hottest_on_host()
        # A block and the window of its experts count as one.
        depth += bool(depth and routing)
        waiting = waiting | routing.asked_windows
        coming = order.upcoming(site, waiting, depth, self.stays)
        self.prefetch_sites([*now, *coming], extra)

    def shut(self) -> None:
        """Closes all sites. Called when no caller can be inside any more. An interrupt
        (Ctrl-C) may come between any two lines, so a `leave` may be missing."""
        self.routing.forget()
        if not any(self._inside) and not self._working_set.has_readers:
            return
        self._working_set.release_all()
        for site in range(len(self.sites)):
            self._inside[site] = 0
            self._unbind(site)

    def _units_of(self, site: int) -> tuple[int, ...]:
        """The units to load before `site` runs, as far as is known."""
        if self.routing.is_window(site):
            return self.routing.expected(site, self._working_set.holds)
        return self.sites[site].units

    def _release(self, units: Iterable[int], *, spoilt: bool) -> None:
        for unit in units:
            self._working_set.release(unit)
            if spoilt:
                self._working_set.load_again(unit)

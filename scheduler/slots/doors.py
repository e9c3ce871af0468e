"""The doors of a model's sites: open while the site's units are there and bound.

A site is a module that runs as a whole (a block, an embedding, a head); it needs one
unit, or several where it shares weights with others.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from ...io.errors import PenstockError
from .working_set import WorkingSet


@dataclass(frozen=True, slots=True)
class Site:
    """A module at whose door micro-batches wait."""

    name: str
    units: tuple[int, ...]


class Doors:
    """Counts who is inside each site and keeps its units until the last one left.

    `bind(site, offsets)` makes the site's parameters real once its units stand at
    `offsets`; `unbind(site)` takes them away before the bytes may be reused. Where one
    of them raises, somebody has written to the weights: they are loaded again.
    """

    def __init__(
        self,
        sites: Sequence[Site],
        working_set: WorkingSet,
        *,
        bind: Callable[[int, tuple[int, ...]], None],
        unbind: Callable[[int], None],
    ) -> None:
        self.sites = sites
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
        """Opens the door if nobody is inside: waits for the units and binds them."""
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
        """Binds what an open `site` has bound already, for another kind of reader."""
        self._bind(site, self._offsets[site])

    def leave(self, site: int) -> None:
        """Closes the door behind the last one: the units may be overwritten."""
        self._inside[site] -= 1
        if self._inside[site] == 0:
            spoilt = False
            try:
                self._unbind(site)
                for other in self._sharing[site]:
                    if self._inside[other]:  # it still needs what both had bound
                        self._bind(other, self._offsets[other])
            except PenstockError:
                spoilt = True
                raise
            finally:
                self._release(self.sites[site].units, spoilt=spoilt)

    def stays(self, site: int) -> bool:
        """Whether the site's units are there for good."""
        return all(self._working_set.stays(unit) for unit in self.sites[site].units)

    def expect(self, sites: Iterable[int]) -> None:
        """Starts loading what these sites will need, soonest first."""
        units = [unit for site in sites for unit in self.sites[site].units]
        self._working_set.prefetch(dict.fromkeys(units))

    def shut(self) -> None:
        """Closes whatever is open. Called when nobody can be inside any more: an
        interrupt (Ctrl-C) may strike between any two lines and cut a `leave` off."""
        if not any(self._inside) and not self._working_set.has_readers:
            return
        self._working_set.release_all()
        for site in range(len(self.sites)):
            self._inside[site] = 0
            self._unbind(site)

    def _release(self, units: Iterable[int], *, spoilt: bool) -> None:
        for unit in units:
            self._working_set.release(unit)
            if spoilt:
                self._working_set.load_again(unit)

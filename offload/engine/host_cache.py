"""Keeps those experts in host memory that are used most, where it has not room for all.

One expert at a time takes the place of another of its layer that is used less. Until it
is read, both come from disk.
"""

from collections.abc import Sequence
from contextlib import suppress

from ...io.closing import Closing
from ...io.event import Event
from ...io.tier import Tier
from ...io.weights.loader import Loader, UnitLoad
from ...scheduler.slots.routing import Routing
from ...scheduler.slots.working_set import WorkingSet
from ..policy import Policy
from .host_experts import HostExperts
from .tiers import Tiers


class HostCache(Closing):
    """Exchanges units between host memory and disk. Used by the thread that has the
    turn; reads run meanwhile.

    The steps of an exchange are: the old unit is loaded from disk from now on; once
    copies of it to the device are done, the new one is read into its place; once that
    is done, it is loaded from there.
    """

    def __init__(
        self,
        tiers: Tiers,
        working_set: WorkingSet,
        routing: Routing,
        experts: HostExperts,
        policy: Policy,
    ) -> None:
        self._tiers = tiers
        self._working_set = working_set
        self._routing = routing
        self.experts = experts
        self._link = next((x for x in tiers.links if x.tier == Tier.HOST), None)
        self._is_fixed = policy.host_shared or self._link is None
        self._loader: Loader | None = None
        self._new: int | None = None
        """The unit that is to be read, or is being read."""
        self._copied: Event | None = None
        self._load: UnitLoad | None = None
        self._seen: tuple[int, int] | None = None

    def step(self, units: Sequence[int], num_passes: int) -> None:
        """Goes on with the exchange that is under way, or begins one among `units`, the
        experts of a layer. Call it while one of their windows is open; in each pass,
        only the first call counts."""
        if self._is_fixed or self._seen == (units[0], num_passes):
            return
        self._seen = units[0], num_passes
        if self._load is not None:
            if self._load.is_done:
                self._finish()
        elif self._copied is not None:
            self._read()
        else:
            self._begin(units)

    def settle(self) -> None:
        """Ends the exchange that is under way: afterwards each unit is in one tier."""
        if self._copied is not None:
            self._read()
        if self._load is not None:
            self._finish()

    def close(self) -> None:
        """Waits for the read under way, ends the loader's threads, and closes what
        computes experts."""
        self._is_fixed = True
        if self._load is not None:
            self._load.wait_quietly()
        if self._loader is not None:
            self._loader.close()
            self._loader = None
        self.experts.close()

    def _begin(self, units: Sequence[int]) -> None:
        host, link = self._tiers.host, self._link
        assert host is not None, "there is a link from it"
        assert link is not None, "else nothing is exchanged"
        placement = self._tiers.placement
        here = (u for u in units if placement[u] == Tier.HOST and self._is_idle(u))
        there = (u for u in units if placement[u] == Tier.DISK)
        found = self._routing.exchange(here, there)
        if found is None or not host.has_room_for(found[1], found[0]):
            return
        old, self._new = found
        placement[old] = Tier.DISK
        host.give_place(old, self._new)
        self.experts.forget(old)
        self._copied = link.mark()

    def _is_idle(self, unit: int) -> bool:
        """Whether nobody uses `unit` in host memory or waits for a copy of it."""
        return not (self._working_set.holds(unit) or self._routing.is_on_host(unit))

    def _read(self) -> None:
        """Starts to read the new unit. Where that fails, now or later, the unit stays
        on disk, and whoever loads it is told; the place is not used again."""
        host, copied, new = self._tiers.host, self._copied, self._new
        assert host is not None, "a unit has a place there"
        assert copied is not None, "the copies before have an event"
        assert new is not None, "a unit is to be read"
        copied.wait()
        self._copied = None
        if self._loader is None:
            self._loader = host.loader()
        with suppress(Exception):
            self._load = self._loader.load(new, host.offsets[new])

    def _finish(self) -> None:
        load, new, self._load = self._load, self._new, None
        assert load is not None, "a unit is being read"
        assert new is not None, "a unit is being read"
        with suppress(Exception):
            load.wait()
            self._tiers.placement[new] = Tier.HOST
            self.experts.remember(new)
            self._routing.on_host.num_exchanged += 1

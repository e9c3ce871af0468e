"""Keeps those experts in host memory that are used most, where it has not room for all.

In each layer, one expert at a time takes the place of another that is used less. Until
it is read, both come from disk.
"""

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass

from ...io.closing import Closing
from ...io.event import Event
from ...io.tier import Tier
from ...io.weights.load import Load
from ...io.weights.loader import Loader
from ...scheduler.slots.routing import Routing
from ...scheduler.slots.working_set import WorkingSet
from ..policy import Policy
from .host_experts import HostExperts
from .tiers import Tiers


@dataclass(slots=True)
class _Exchange:
    """A unit that takes the place of another one."""

    new: int
    copied: Event
    """Passes when copies of the old unit to the device are done."""
    load: Load | None = None


class HostCache(Closing):
    """Exchanges units between host memory and disk. Used by the thread that has the
    turn; reads run meanwhile.

    The steps of an exchange are: the old unit is loaded from disk from now on; once
    copies of it to the device are done, the new one is read into its place; once that
    is done, it is loaded from there. There is a pass between two steps, in which what
    they wait for is done: so where a unit is in a pass depends on no clock.
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
        self._seen: dict[int, int] = {}
        """The pass of the last step in each layer, by the layer's first unit."""
        self._exchanges: dict[int, _Exchange] = {}
        """Those under way, likewise."""

    def step(self, units: Sequence[int], num_passes: int) -> None:
        """Goes on with the exchange that is under way among `units`, the experts of a
        layer, or begins one. Call it while one of their windows is open; in each pass,
        only the first call counts."""
        layer = units[0]
        if self._is_fixed or self._seen.get(layer) == num_passes:
            return
        self._seen[layer] = num_passes
        exchange = self._exchanges.get(layer)
        if exchange is None:
            self._begin(units)
        elif exchange.load is None:
            self._read(layer)
        else:
            self._finish(layer)

    def settle(self) -> None:
        """Ends the exchanges that are under way: then each unit is in one tier."""
        for layer, exchange in list(self._exchanges.items()):
            if exchange.load is None:
                self._read(layer)
            self._finish(layer)

    def close(self) -> None:
        """Waits for the reads under way, ends the loader's threads, and closes what
        computes experts."""
        self._is_fixed = True
        for exchange in self._exchanges.values():
            if exchange.load is not None:
                exchange.load.wait_quietly()
        self._exchanges.clear()
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
        old, new = found
        placement[old] = Tier.DISK
        host.give_place(old, new)
        self.experts.forget(old)
        self._exchanges[units[0]] = _Exchange(new, link.mark())

    def _is_idle(self, unit: int) -> bool:
        """Whether nobody uses `unit` in host memory or waits for a copy of it."""
        return not (self._working_set.holds(unit) or self._routing.is_on_host(unit))

    def _read(self, layer: int) -> None:
        """Starts to read the new unit. Where that fails, now or later, the unit stays
        on disk, and whoever loads it is told; the place is not used again."""
        host, exchange = self._tiers.host, self._exchanges[layer]
        assert host is not None, "a unit has a place there"
        exchange.copied.wait()
        if self._loader is None:
            self._loader = host.loader()
        try:
            exchange.load = self._loader.load(exchange.new, host.offsets[exchange.new])
        except Exception:
            del self._exchanges[layer]

    def _finish(self, layer: int) -> None:
        exchange = self._exchanges.pop(layer, None)
        if exchange is None or exchange.load is None:
            return  # its read did not even begin
        with suppress(Exception):
            exchange.load.wait()
            self._tiers.placement[exchange.new] = Tier.HOST
            self.experts.remember(exchange.new)
            self._routing.on_host.num_exchanged += 1

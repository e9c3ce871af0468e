"""The units of weights in fast memory: loaded, read, released and replaced.

One rule keeps weights right: a load only writes to bytes that nobody reads. Every
reader calls `acquire` and `release`, so it is known which bytes those are.
"""

import time
from collections.abc import Callable, Iterable, Sequence

from ...io.errors import DoesNotFitError, closed
from ...io.event import Event
from ...io.timeline import WAIT, Record, unrecorded
from ...io.weights.load import Load
from .needed_groups import NeededGroups
from .routing import ALWAYS
from .slots import Held, Slot, Slots
from .working_set_statistics import WorkingSetStatistics


class WorkingSet:
    """Holds units of `sizes` bytes in an arena of `capacity` bytes.

    `load(unit, offset, after)` starts a load and returns it; if it raises, no load is
    under way. The load waits for the events `after`: until then a device may use those
    bytes. `mark()` records an event after all device work queued so far, or returns
    None on a synchronous device. Each of the `needed` units always finds room (others
    are only loaded by a fault). All methods are called by one thread at a time.

    Each of the `staying` units has a slot for good. Any other unit, once released,
    stays until its bytes are needed. The unit that was released last is evicted first:
    a cyclic sweep needs it again last, so as much as fits stays from pass to pass.
    Before those, units go that are of less `worth`, which is at most `ALWAYS`.
    """

    def __init__(
        self,
        sizes: Sequence[int],
        *,
        names: Sequence[str],
        capacity: int,
        load: Callable[[int, int, tuple[Event, ...]], Load],
        mark: Callable[[], Event | None],
        needed: frozenset[int],
        staying: Iterable[int] = (),
        record: Record = unrecorded,
        worth: Callable[[int], int] = lambda unit: ALWAYS,
    ) -> None:
        self._record = record
        self._worth = worth
        self._sizes = sizes
        self._names = names
        self._needed = NeededGroups(sizes, needed)
        self._load = load
        self._mark = mark
        self._slots = Slots(capacity)
        self._places = {u: self._slots.reserve(u, sizes[u]) for u in staying}
        self._held: dict[int, Held] = {}
        self._resident: set[int] = set()
        self._clock = 0
        self._num_prefetches = 0
        self._peak = 0
        self.wait_seconds = 0.0
        self._num_unused = 0
        self._is_closed = False

    def __repr__(self) -> str:
        return f"<WorkingSet: {sorted(self._held)} in {self._slots!r}>"

    @property
    def has_readers(self) -> bool:
        """Whether a unit that is not resident is being read."""
        return any(h.users and u not in self._resident for u, h in self._held.items())

    def acquire(self, unit: int) -> int:
        """Waits until `unit` is loaded and returns its offset in bytes; it stays until
        `release`. Raises DoesNotFitError when the units in use leave no room for it."""
        return self.acquire_together((unit,))[0]

    def acquire_together(self, units: Sequence[int]) -> tuple[int, ...]:
        """Acquires all `units`, or none of them when it raises; see `acquire`."""
        start = time.perf_counter()
        try:
            claimed = self._claim_all(units)
            try:
                for held in claimed:
                    held.load.wait()
            except BaseException:
                self._give_up(units)
                raise
        finally:
            self.wait_seconds += (end := time.perf_counter()) - start
            if units:  # a site without units reads its weights in host memory
                self._record(WAIT, self._names[units[0]], start, end)
        for held in claimed:
            held.was_read = True
        return tuple(held.slot.offset for held in claimed)

    def release(self, unit: int) -> None:
        """Ends one `acquire` of `unit`."""
        if self._is_closed:
            return  # closed while it was read: all slots are gone
        held = self._held[unit]
        assert held.users > 0, f"unit {unit} was released more often than acquired"
        held.users -= 1
        self._clock += 1
        held.released_at = self._clock
        held.last_read = self._mark()

    def release_all(self) -> None:
        """Ends every `acquire`: an interrupt may have skipped a `release`."""
        for unit, held in self._held.items():
            if unit not in self._resident:
                held.users = 0

    def prefetch(self, units: Iterable[int], extra: Iterable[int] = ()) -> None:
        """Starts loading `units`, in this order. Evicts only units that were read or
        are not expected any more; stops at the first unit that finds no room. Then
        loads those of `extra` that are worth twice as much as any that they evict."""
        wanted = dict.fromkeys(units)
        self._num_prefetches += 1
        for unit in wanted.keys() & self._held.keys():
            self._held[unit].wanted_at = self._num_prefetches
        missing = [unit for unit in wanted if unit not in self._held]
        more = [u for u in dict.fromkeys(extra) if not (u in wanted or u in self._held)]
        if self._is_closed or not (missing or more):
            return
        may_go = {
            other: held.cost(self._worth(other))
            for other, held in self._held.items()
            if other not in wanted and self._is_idle(other)
            if held.may_go(self._num_prefetches)
        }
        try:
            for unit in missing:
                costs = {other: c for other, c in may_go.items() if other in self._held}
                if self._claim_and_load(unit, costs) is None:
                    return
            for unit in more:
                most = self._worth(unit) // 2
                less = (o for o in may_go if o in self._held and self._worth(o) <= most)
                held = self._claim_and_load(unit, {o: may_go[o] for o in less})
                if held is not None:
                    held.is_extra = True
        except Exception:  # raised again by the acquire that needs the unit
            return

    def need_together(self, groups: Iterable[tuple[int, ...]]) -> None:
        """Tells `keep` and `acquire` to leave room for each of these groups at once,
        whichever of its units is acquired first."""
        for group in groups:
            self._needed.add(group, self._places)

    def keep(self, unit: int) -> bool:
        """Makes `unit`, which is loaded, resident: it is never evicted again. Returns
        False, and changes nothing, if other needed units would not find room then."""
        pinned = self._resident | {unit} | set(self._places)
        if not self._slots.all_fit_beside(pinned, self._needed.missing(pinned)):
            return False
        self._resident.add(unit)
        return True

    def load_again(self, unit: int) -> None:
        """Drops the loaded values of `unit`, whose source or slot was written to. If it
        cannot be evicted, loads it into its slot again and waits for that."""
        held = self._held.get(unit)
        if held is None:
            return
        if not held.users and unit not in self._resident:
            self._drop(unit)
            return
        held.load.wait_quietly()
        after = tuple(filter(None, (held.load.ready, held.last_read, self._mark())))
        held.load = self._load(unit, held.slot.offset, after)
        held.load.wait()

    def is_resident(self, unit: int) -> bool:
        return unit in self._resident

    def holds(self, unit: int) -> bool:
        """Whether `unit` has a slot: it is loaded, or being loaded."""
        return unit in self._held

    def stays(self, unit: int) -> bool:
        """Whether `unit` is loaded and is never evicted."""
        return unit in self._resident or (unit in self._places and unit in self._held)

    def statistics(self) -> WorkingSetStatistics:
        counts = self._slots.capacity, self._peak, self.wait_seconds, self._num_unused
        return WorkingSetStatistics(*counts, tuple(sorted(self._resident)))

    def close(self) -> None:
        """Waits for the loads under way. Afterwards `acquire` raises."""
        self._is_closed = True
        for held in self._held.values():
            held.load.wait_quietly()
        self._held.clear()

    def _claim_all(self, units: Sequence[int]) -> list[Held]:
        if self._is_closed:
            raise closed()
        # Units that are loaded come first, so that the others do not evict them.
        order = sorted(units, key=lambda unit: unit not in self._held)
        if not (self._claim_each(order) and self._leave_room(units)):
            # They may still fit where a unit that nobody reads lies in the way now,
            # even one of `units`: evict all of those and try again.
            stay = self._in_the_way()
            sizes = [self._sizes[unit] for unit in set(units) - stay]
            if not self._slots.fit_beside(stay, sizes):
                kept = self._resident | set(self._places)
                names = " + ".join(repr(self._names[u]) for u in units)
                asked = names, set(units), self._sizes, stay - kept, kept
                raise DoesNotFitError(self._slots.why_not(*asked))
            for unit in self._held.keys() - stay:
                self._evict(unit)
            claims = self._claim_each(sorted(units, key=lambda u: -self._sizes[u]))
            assert claims, "they fit beside what stays"
        return [self._held[unit] for unit in units]

    def _claim_each(self, units: Sequence[int]) -> bool:
        """Counts one more reader of each of `units`. Returns False, and counts none, if
        one of them finds no room."""
        taken: list[Held] = []
        try:
            for unit in units:
                idle = filter(self._is_idle, () if unit in self._held else self._held)
                costs = {o: self._held[o].cost(self._worth(o)) for o in idle}
                held = self._held.get(unit) or self._claim_and_load(unit, costs)
                if held is None:
                    break
                held.users += 1
                taken.append(held)
        finally:
            if len(taken) < len(units):
                for held in taken:
                    held.users -= 1
        return len(taken) == len(units)

    def _leave_room(self, units: Sequence[int]) -> bool:
        """Whether the others have room that are needed together with some of `units`,
        which are claimed. If not, ends their claim."""
        if not self._needed.has_others(units):
            return True
        there = self._in_the_way()
        missing = self._needed.missing_beside(units, there)
        if not (fit := self._slots.all_fit_beside(there, missing)):
            for unit in units:
                self._held[unit].users -= 1
        return fit

    def _give_up(self, units: Sequence[int]) -> None:
        """Undoes an `acquire` whose loads failed. The next one loads again."""
        for unit in units:
            held = self._held[unit]
            held.users -= 1
            if not held.was_read and not held.users:
                self._drop(unit)

    def _in_the_way(self) -> set[int]:
        """The units that are read or stay: their bytes cannot be had."""
        return {u for u in self._held if not self._is_idle(u)} | self._places.keys()

    def _is_idle(self, unit: int) -> bool:
        stays = unit in self._resident or unit in self._places
        return self._held[unit].users == 0 and not stays

    def _claim_and_load(self, unit: int, costs: dict[int, int]) -> Held | None:
        slot = self._places.get(unit) or self._claim(unit, costs)
        if slot is None:
            return None
        self._peak = max(self._peak, self._slots.used_bytes)
        after = self._slots.pending(slot)
        try:
            load = self._load(unit, slot.offset, after)
            held = self._held[unit] = Held(slot, load, self._num_prefetches)
        except Exception:  # after an interrupt a load may still write: keep the slot
            self._free(slot, after)
            raise
        return held

    def _claim(self, unit: int, costs: dict[int, int]) -> Slot | None:
        nbytes = self._sizes[unit]
        if (slot := self._slots.claim(unit, nbytes)) is not None:
            return slot
        for other in self._slots.cheapest_room(nbytes, costs):
            self._evict(other)
        return self._slots.claim(unit, nbytes)

    def _evict(self, unit: int) -> None:
        self._num_unused += not self._held[unit].was_read
        self._drop(unit)

    def _drop(self, unit: int) -> None:
        held = self._held[unit]
        # A load may still write to these bytes, which become another unit's.
        held.load.wait_quietly()
        del self._held[unit]
        self._free(held.slot, (held.load.ready, held.last_read))

    def _free(self, slot: Slot, marks: Iterable[Event | None]) -> None:
        self._slots.release(slot, filter(None, marks), stays=slot.unit in self._places)

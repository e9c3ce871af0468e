"""The units in fast memory: claimed, filled, read, released, and filled again.

The one rule that keeps weights right: a load goes only into bytes that nobody reads,
and what nobody reads is known, because every reader says so (`acquire`, `release`).
"""

import time
from collections.abc import Callable, Iterable, Sequence

from ...io.errors import DoesNotFitError, closed
from ...io.event import Event
from ...io.timeline import WAIT, Record, unrecorded
from .arena_map import Slot, Slots
from .load import Held, Load
from .working_set_statistics import WorkingSetStatistics


class WorkingSet:
    """Holds units of `sizes` bytes in an arena of `capacity` bytes.

    `load(unit, offset, after)` starts a load and returns it; if it raises, nothing is
    under way. What a device still does with those bytes is over when all of `after`
    have passed; `mark()` is the point that a device's work has come to, or None where
    all work is done when it is given. `needed` units must find room whatever becomes
    resident (others are only ever loaded by a fault). All methods are called by one
    thread at a time; loads run elsewhere.

    `staying` units have a place of their own, for good. Any other stays, released,
    until its bytes are needed. The one released last goes first: in a cyclic sweep it
    is needed again last, so as much as fits stays from pass to pass.
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
    ) -> None:
        self._record = record
        self._sizes = sizes
        self._names = names
        self._needed: set[tuple[int, ...]] = {(unit,) for unit in needed}
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
        return any(
            held.users and unit not in self._resident
            for unit, held in self._held.items()
        )

    def acquire(self, unit: int) -> int:
        """Waits until `unit` is there and returns its offset; it stays until as many
        `release`. Raises DoesNotFitError when what is in use leaves no room."""
        return self.acquire_together((unit,))[0]

    def acquire_together(self, units: Sequence[int]) -> tuple[int, ...]:
        """`acquire` of all `units` or, when it raises, of none."""
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
            if units:  # else they are used where they lie
                self._record(WAIT, self._names[units[0]], start, end)
        for held in claimed:
            held.was_read = True
        return tuple(held.slot.offset for held in claimed)

    def release(self, unit: int) -> None:
        """One reader of `unit` is done with it."""
        if self._is_closed:
            return  # closed under a reader: there is nothing left to give back
        held = self._held[unit]
        assert held.users > 0, f"unit {unit} was released more often than acquired"
        held.users -= 1
        self._clock += 1
        held.released_at = self._clock
        held.last_read = self._mark()

    def release_all(self) -> None:
        """Nobody reads any more: forgets the readers that an interrupt cut off."""
        for unit, held in self._held.items():
            if unit not in self._resident:
                held.users = 0

    def prefetch(self, units: Iterable[int]) -> None:
        """Starts loading `units`, soonest first, into bytes that nobody reads and
        nobody waits for; stops at the first that finds no such bytes."""
        wanted = [] if self._is_closed else list(units)
        self._num_prefetches += 1
        for unit in self._held.keys() & set(wanted):
            self._held[unit].wanted_at = self._num_prefetches
        for unit in wanted:
            if unit in self._held:
                continue
            costs = {
                other: self._cost(held)
                for other, held in self._held.items()
                if self._is_idle(other)
                and other not in wanted
                and (held.was_read or self._was_guessed_wrong(held))
            }
            try:
                if self._claim_and_load(unit, costs) is None:
                    return
            except Exception:  # raised again by the acquire that needs the unit
                return

    def need_together(self, groups: Iterable[tuple[int, ...]]) -> None:
        """The units of each group are acquired at once: `keep` leaves room for that."""
        self._needed.update(groups)

    def keep(self, unit: int) -> bool:
        """Makes `unit` (held already) resident: it is never thrown out again. Refuses,
        returning False, where others that are needed would no longer find room."""
        pinned = self._resident | {unit} | set(self._places)
        for group in self._needed:
            sizes = [self._sizes[other] for other in group if other not in pinned]
            if not self._slots.fit_beside(pinned, sizes):
                return False
        self._resident.add(unit)
        return True

    def load_again(self, unit: int) -> None:
        """What is stored of `unit` has changed, or its bytes here have: it is thrown
        out or, where it must stay, loaded in place and waited for."""
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

    def stays(self, unit: int) -> bool:
        """Whether `unit` is there and is never thrown out."""
        return unit in self._resident or (unit in self._places and unit in self._held)

    def statistics(self) -> WorkingSetStatistics:
        return WorkingSetStatistics(
            self._slots.capacity,
            self._peak,
            self.wait_seconds,
            self._num_unused,
            tuple(sorted(self._resident)),
        )

    def close(self) -> None:
        """Waits for the loads under way; nothing may be acquired afterwards."""
        self._is_closed = True
        for held in self._held.values():
            held.load.wait_quietly()
        self._held.clear()

    def _claim_all(self, units: Sequence[int]) -> list[Held]:
        if self._is_closed:
            raise closed()
        # What is here already first, so that the others do not throw it out.
        order = sorted(units, key=lambda unit: unit not in self._held)
        if not self._claim_each(order):
            # Together they may fit where what one of them found in place, or what
            # nobody reads, now stands in the way: start from an emptied arena.
            idle = {unit for unit in self._held if self._is_idle(unit)}
            stay = self._held.keys() - idle | self._places.keys()
            sizes = [self._sizes[unit] for unit in set(units) - stay]
            if not self._slots.fit_beside(stay, sizes):
                raise DoesNotFitError(self._why_not(units))
            for unit in idle:
                self._evict(unit)
            claims = self._claim_each(sorted(units, key=lambda u: -self._sizes[u]))
            assert claims, "they fit beside what stays"
        return [self._held[unit] for unit in units]

    def _claim_each(self, units: Sequence[int]) -> bool:
        """Makes the caller a reader of each, or of none and returns False."""
        taken: list[Held] = []
        try:
            for unit in units:
                held = self._held.get(unit) or self._claim_for_reading(unit)
                if held is None:
                    break
                held.users += 1
                taken.append(held)
        finally:
            if len(taken) < len(units):
                for held in taken:
                    held.users -= 1
        return len(taken) == len(units)

    def _claim_for_reading(self, unit: int) -> Held | None:
        idle = filter(self._is_idle, self._held)
        return self._claim_and_load(unit, {o: self._cost(self._held[o]) for o in idle})

    def _give_up(self, units: Sequence[int]) -> None:
        """Undoes an acquire whose loads failed: the next one loads anew."""
        for unit in units:
            held = self._held[unit]
            held.users -= 1
            if not held.was_read and not held.users:
                self._drop(unit)

    def _is_idle(self, unit: int) -> bool:
        stays = unit in self._resident or unit in self._places
        return self._held[unit].users == 0 and not stays

    def _was_guessed_wrong(self, held: Held) -> bool:
        """Whether nobody has expected it for two visits: a site that turned out not to
        run must not keep its bytes for ever."""
        return held.wanted_at < self._num_prefetches - 1

    def _cost(self, held: Held) -> int:
        """Of throwing a unit out: its bytes; among equals, the one released last goes;
        one that was prefetched and not yet read costs more than all that were."""
        unread = 0 if held.was_read else 1 << 120
        return unread + (held.slot.nbytes << 64) - held.released_at

    def _claim_and_load(self, unit: int, costs: dict[int, int]) -> Held | None:
        slot = self._places.get(unit) or self._claim(unit, costs)
        if slot is None:
            return None
        self._peak = max(self._peak, self._slots.used_bytes)
        after = self._slots.pending(slot)
        try:
            load = self._load(unit, slot.offset, after)
            held = self._held[unit] = Held(slot, load, self._num_prefetches)
        except Exception:  # after an interrupt the slot is lost: who knows what writes
            self._free(slot, after)
            raise
        return held

    def _claim(self, unit: int, costs: dict[int, int]) -> Slot | None:
        nbytes = self._sizes[unit]
        slot = self._slots.claim(unit, nbytes)
        if slot is None:
            for other in self._slots.cheapest_room(nbytes, costs):
                self._evict(other)
            slot = self._slots.claim(unit, nbytes)
        return slot

    def _evict(self, unit: int) -> None:
        self._num_unused += not self._held[unit].was_read
        self._drop(unit)

    def _drop(self, unit: int) -> None:
        held = self._held[unit]
        # Nobody may write into these bytes once they are somebody else's.
        held.load.wait_quietly()
        del self._held[unit]
        self._free(held.slot, (held.load.ready, held.last_read))

    def _free(self, slot: Slot, marks: Iterable[Event | None]) -> None:
        after = [mark for mark in marks if mark is not None]
        self._slots.release(slot, after, stays=slot.unit in self._places)

    def _why_not(self, units: Sequence[int]) -> str:
        kept = self._resident | set(self._places)
        in_use = {u for u, held in self._held.items() if held.users} - kept
        used, stays = (sum(self._sizes[u] for u in some) for some in (in_use, kept))
        need = sum(self._sizes[u] for u in set(units) - in_use - kept)
        least = self._slots.least_for(need, in_use | kept)
        capacity = self._slots.capacity
        names = " + ".join(repr(self._names[u]) for u in units)
        return (
            f"{names} needs {need} bytes with {used} in use and {stays} resident, but "
            f"the working set has {capacity}; set device_memory to at least {least}"
        )

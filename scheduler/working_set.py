"""The units in fast memory: claimed, filled, read, released, and filled again.

The one rule that keeps weights right: a load goes only into bytes that nobody reads,
and what nobody reads is known, because every reader says so (`acquire`, `release`).
"""

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

from ..io.errors import ClosedError, DoesNotFitError
from .slots import Slot, Slots


class Load(Protocol):
    """A load under way into a slot."""

    @property
    def is_done(self) -> bool: ...

    def wait(self) -> None: ...

    def wait_quietly(self) -> None: ...


@dataclass(frozen=True, slots=True)
class WorkingSetStatistics:
    """Counters since the working set was made."""

    capacity_bytes: int
    peak_bytes: int
    """Most bytes claimed by slots at one time."""
    wait_seconds: float
    """Time for which computing stood still because a unit was not there yet."""
    num_unused_loads: int
    """Units that were prefetched and thrown out before anybody read them."""
    resident_units: tuple[int, ...]


@dataclass(slots=True)
class _Held:
    slot: Slot
    load: Load
    users: int = 0
    was_read: bool = False
    released_at: int = 0


class WorkingSet:
    """Holds units of `sizes` bytes in an arena of `capacity` bytes.

    `load(unit, offset)` starts a load and returns it. `needed` units must find room
    whatever becomes resident (others are only ever loaded by a fault). All methods are
    called by one thread at a time; loads run elsewhere.

    A released unit stays until its bytes are needed. The one released last goes first:
    in a cyclic sweep it is needed again last, so a model that fits is read once and of
    a larger one as much as fits stays from pass to pass.
    """

    def __init__(
        self,
        sizes: Sequence[int],
        *,
        names: Sequence[str],
        capacity: int,
        load: Callable[[int, int], Load],
        needed: frozenset[int],
    ) -> None:
        self._sizes = sizes
        self._names = names
        self._needed = needed
        self._load = load
        self._slots = Slots(capacity)
        self._held: dict[int, _Held] = {}
        self._resident: set[int] = set()
        self._clock = 0
        self._claimed = 0
        self._peak = 0
        self.wait_seconds = 0.0
        self._num_unused = 0
        self._is_closed = False

    def __repr__(self) -> str:
        return f"<WorkingSet: {sorted(self._held)} in {self._slots!r}>"

    def acquire(self, unit: int) -> int:
        """Waits until `unit` is there and returns its offset; it stays until as many
        `release`. Raises DoesNotFitError when what is in use leaves no room."""
        start = time.perf_counter()
        held = self._find_or_load(unit)
        held.users += 1
        try:
            held.load.wait()
        except BaseException:
            held.users -= 1
            if held.users == 0 and unit not in self._resident:
                self._drop(unit)
            raise
        finally:
            self.wait_seconds += time.perf_counter() - start
        held.was_read = True
        return held.slot.offset

    def release(self, unit: int) -> None:
        """One reader of `unit` is done with it."""
        held = self._held[unit]
        assert held.users > 0, f"unit {unit} was released more often than acquired"
        held.users -= 1
        self._clock += 1
        held.released_at = self._clock

    def prefetch(self, units: Iterable[int]) -> None:
        """Starts loading `units`, soonest first, into bytes that nobody reads and
        nobody waits for; stops at the first that finds no such bytes."""
        wanted = list(units)
        for unit in wanted:
            if unit in self._held:
                continue
            costs = {
                other: self._cost(held)
                for other, held in self._held.items()
                if held.was_read and self._is_idle(other) and other not in wanted
            }
            if self._claim_and_load(unit, costs) is None:
                return

    def keep(self, unit: int) -> bool:
        """Makes `unit` (held already) resident: it is never thrown out again. Refuses,
        returning False, where the largest other unit would no longer find room."""
        pinned = self._resident | {unit}
        others = [self._sizes[u] for u in self._needed - pinned]
        if self._slots.largest_gap_beside(pinned) < max(others, default=0):
            return False
        self._resident.add(unit)
        return True

    def is_resident(self, unit: int) -> bool:
        return unit in self._resident

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

    def _find_or_load(self, unit: int) -> _Held:
        if self._is_closed:
            raise ClosedError("this model was closed; load it again to use it")
        if (held := self._held.get(unit)) is not None:
            return held
        costs = {
            other: self._cost(held)
            for other, held in self._held.items()
            if self._is_idle(other)
        }
        claimed = self._claim_and_load(unit, costs)
        if claimed is None:
            raise DoesNotFitError(self._why_not(unit))
        return claimed

    def _is_idle(self, unit: int) -> bool:
        return self._held[unit].users == 0 and unit not in self._resident

    def _cost(self, held: _Held) -> int:
        """Of throwing a unit out: its bytes; among equals, the one released last goes;
        one that was prefetched and not yet read costs more than all that were."""
        unread = 0 if held.was_read else 1 << 120
        return unread + (held.slot.nbytes << 64) - held.released_at

    def _claim_and_load(self, unit: int, costs: dict[int, int]) -> _Held | None:
        nbytes = self._sizes[unit]
        slot = self._slots.claim(unit, nbytes)
        if slot is None:
            for other in self._slots.cheapest_room(nbytes, costs):
                self._drop(other)
            slot = self._slots.claim(unit, nbytes)
            if slot is None:
                return None
        self._claimed += nbytes
        self._peak = max(self._peak, self._claimed)
        held = self._held[unit] = _Held(slot, self._load(unit, slot.offset))
        return held

    def _drop(self, unit: int) -> None:
        held = self._held.pop(unit)
        if not held.was_read:
            self._num_unused += 1
        # Nobody may write into these bytes once they are somebody else's.
        held.load.wait_quietly()
        self._slots.release(held.slot)
        self._claimed -= held.slot.nbytes

    def _why_not(self, unit: int) -> str:
        used = sum(h.slot.nbytes for h in self._held.values() if h.users)
        kept = sum(self._sizes[u] for u in self._resident)
        return (
            f"{self._names[unit]!r} needs {self._sizes[unit]} bytes with {used} in "
            f"use and {kept} resident, but the working set has {self._slots.capacity}; "
            f"set device_memory to at least {self._sizes[unit] + used + kept}"
        )

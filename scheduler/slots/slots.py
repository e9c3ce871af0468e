"""Which bytes of the arena hold which unit. Pure bookkeeping: no data is moved here.

Slots differ in size and are allocated where they fit. Consecutive units are placed at
opposite ends of the arena. So whenever two units fit together, the second one finds its
bytes in one piece while the first is being read.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from ...io.event import Event
from ...io.weights.load import Load
from .pending_ranges import PendingRanges


@dataclass(frozen=True, slots=True)
class Slot:
    """A region of the arena that holds one unit."""

    unit: int
    offset: int
    nbytes: int

    @property
    def end(self) -> int:
        return self.offset + self.nbytes


@dataclass(slots=True)
class Held:
    """A unit that has a slot."""

    slot: Slot
    load: Load
    wanted_at: int
    """The number of the last `prefetch` that named this unit."""
    users: int = 0
    was_read: bool = False
    released_at: int = 0
    last_read: Event | None = None
    """The event after the device work that the last reader queued."""
    is_extra: bool = False
    """Whether it was loaded only because it is used often."""

    def may_go(self, num_prefetches: int) -> bool:
        """Whether a prefetch may evict it, if nobody reads it: it was read, or the last
        two of so many prefetches did not name it. A site that turns out not to run must
        not keep its bytes for ever."""
        is_wanted = self.wanted_at >= num_prefetches - 1 and not self.is_extra
        return self.was_read or not is_wanted

    def cost(self, worth: int) -> int:
        """The cost of evicting it: its bytes times its `worth` and, among equals, least
        for the one released last. One that is expected and not yet read costs more than
        all others."""
        unread = 0 if self.was_read or self.is_extra else 1 << 120
        return unread + (self.slot.nbytes * worth << 56) - self.released_at


class Slots:
    """The slots of an arena of `capacity` bytes, kept in address order."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self._slots: list[Slot] = []
        self._pending_ranges: PendingRanges[Event] = PendingRanges()

    def __repr__(self) -> str:
        used, total = self.used_bytes, self.capacity
        return f"<Slots: {len(self._slots)}, {used}/{total} bytes>"

    @property
    def used_bytes(self) -> int:
        return sum(slot.nbytes for slot in self._slots)

    def claim(self, unit: int, nbytes: int) -> Slot | None:
        """Allocates `nbytes` (at least 1) in the smallest gap that holds them; None if
        no gap does. A slot never moves once it is claimed."""
        assert nbytes > 0, f"unit {unit} has no bytes: nothing is to be claimed for it"
        gaps = [(end - start, start, end) for start, end in self._gaps()]
        fitting = [gap for gap in gaps if gap[0] >= nbytes]
        if not fitting:
            return None
        _, start, end = min(fitting)
        at_right_end = end == self.capacity and start > 0
        slot = Slot(unit, end - nbytes if at_right_end else start, nbytes)
        self._slots.append(slot)
        self._slots.sort(key=lambda s: s.offset)
        return slot

    def reserve(self, unit: int, nbytes: int) -> Slot:
        """Allocates a slot that is kept for good. There must be room for it: the
        placement was computed so."""
        slot = self.claim(unit, nbytes)
        assert slot is not None, f"no room for unit {unit}, which is to stay"
        return slot

    def release(
        self, slot: Slot, after: Iterable[Event] = (), *, stays: bool = False
    ) -> None:
        """Frees a claimed slot, or, if it `stays`, only its content. Its bytes may be
        written once all events of `after` have passed."""
        self._pending_ranges.add(slot.offset, slot.end, after)
        if not stays:
            self._slots.remove(slot)

    def pending(self, slot: Slot) -> tuple[Event, ...]:
        """The events that the first write into `slot` has to wait for."""
        return self._pending_ranges.take(slot.offset, slot.end)

    def cheapest_room(self, nbytes: int, costs: Mapping[int, int]) -> list[int]:
        """The units to evict so that `nbytes` fit in one piece. Only the keys of
        `costs` may be evicted; the choice has the least sum of costs. Empty where no
        choice makes enough room."""
        best: tuple[int, list[int]] | None = None
        for first in range(len(self._slots)):
            start = self._slots[first - 1].end if first else 0
            evicted: list[int] = []
            cost = 0
            for index in range(first, len(self._slots)):
                unit = self._slots[index].unit
                if unit not in costs:
                    break
                evicted.append(unit)
                cost += costs[unit]
                is_last = index + 1 == len(self._slots)
                end = self.capacity if is_last else self._slots[index + 1].offset
                if end - start >= nbytes:
                    if best is None or cost < best[0]:
                        best = (cost, evicted)
                    break
        return best[1] if best else []

    def largest_gap_beside(self, pinned: set[int]) -> int:
        """The largest piece, in bytes, that would be free if only `pinned` units
        stayed."""
        gaps = self._only(pinned)._gaps()
        return max((end - start for start, end in gaps), default=0)

    def least_for(self, nbytes: int, pinned: set[int]) -> int:
        """The least capacity, in bytes, with which `nbytes` more would fit beside the
        `pinned` units."""
        least = self._only(pinned).used_bytes + nbytes
        if least <= self.capacity:  # room enough, but in pieces
            least = self.capacity + nbytes - self.largest_gap_beside(pinned)
        return least

    def fit_beside(self, pinned: set[int], sizes: Iterable[int]) -> bool:
        """Whether slots of all these `sizes` (bytes) would fit at once if only the
        `pinned` units stayed."""
        trial = self._only(pinned)
        return all(
            trial.claim(-1, nbytes) is not None for nbytes in sorted(sizes)[::-1]
        )

    def all_fit_beside(self, pinned: set[int], groups: Iterable[Iterable[int]]) -> bool:
        """Whether that is so of each of the `groups` of sizes."""
        return all(self.fit_beside(pinned, sizes) for sizes in groups)

    def why_not(
        self,
        names: str,
        units: set[int],
        sizes: Sequence[int],
        in_use: set[int],
        kept: set[int],
    ) -> str:
        """Why `units`, called `names`, do not fit beside those in use and those that
        are kept."""
        used, stays = (sum(sizes[u] for u in some) for some in (in_use, kept))
        need = sum(sizes[u] for u in units - in_use - kept)
        least = self.least_for(need, in_use | kept)
        return (
            f"{names} needs {need} bytes with {used} in use and {stays} resident, but "
            f"the working set has {self.capacity}; set device_memory to at least "
            f"{least}"
        )

    def _only(self, units: set[int]) -> "Slots":
        kept = Slots(self.capacity)
        kept._slots = [slot for slot in self._slots if slot.unit in units]
        return kept

    def _gaps(self) -> list[tuple[int, int]]:
        gaps, position = [], 0
        for slot in self._slots:
            if slot.offset > position:
                gaps.append((position, slot.offset))
            position = slot.end
        if position < self.capacity:
            gaps.append((position, self.capacity))
        return gaps

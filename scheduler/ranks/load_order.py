"""The one order in which all ranks that gather weights load units. Pure."""

from collections.abc import Sequence
from enum import IntEnum


class Ask(IntEnum):
    """What a rank tells the first one, which decides what is loaded next."""

    WANT = 0
    """It has a slot for a unit, and waits for its bytes."""
    NEED = 1
    """It stands still until a unit that it wants has been loaded."""
    DROP = 2
    """It wants a unit no more."""
    WORK = 3
    """It computes: it will want units."""
    REST = 4
    """It has nothing to compute for now; it goes on reading for others."""
    LEAVE = 5
    """It has nothing to compute any more; it goes on reading for others."""


class LoadOrder:
    """Decides which of `num_units` units `num_ranks` ranks load next.

    A unit is loaded once all ranks that work want it. If all of them stand still for
    different units, the one that most of them want is loaded, and then those that the
    same ranks want next: they end their pass, where the others can join them. So each
    rank gets what it needs, in a bounded number of loads, as long as all others either
    work, rest or leave.
    """

    def __init__(self, num_ranks: int, num_units: int) -> None:
        self._ranks = range(num_ranks)
        self._patience = 2 * num_units + num_ranks
        self._wants: list[dict[int, None]] = [{} for _ in self._ranks]
        self._needs: list[int | None] = [None] * num_ranks
        self._works = [True] * num_ranks  # until its model is put together
        self._has_left = [False] * num_ranks
        self._num_passed_over = [0] * num_ranks
        self._last: tuple[int, ...] = ()

    @property
    def is_over(self) -> bool:
        """Whether all ranks have left."""
        return all(self._has_left)

    def hear(self, rank: int, ask: Ask, unit: int) -> None:
        """`rank` says `ask`, of `unit` if that is about one."""
        if ask is Ask.WANT:
            self._wants[rank][unit] = None
        elif ask is Ask.NEED:
            if unit in self._wants[rank]:  # else its load has begun meanwhile
                self._needs[rank] = unit
        elif ask is Ask.DROP:
            self._forget(rank, unit)
        else:
            self._works[rank] = ask is Ask.WORK
            if ask is Ask.LEAVE:
                self._has_left[rank] = True
                self._wants[rank].clear()
                self._needs[rank] = None

    def next(self) -> tuple[int, tuple[int, ...]] | None:
        """The unit to load now and the ranks that want it; None if it has to be heard
        first what others want."""
        active = [r for r in self._ranks if self._is_active(r)]
        if not active:
            return None
        unit = self._wanted_by_all(active)
        if unit is None and all(self._needs[r] is not None for r in active):
            unit = self._most_needed(active)
        if unit is None:
            return None
        takers = tuple(r for r in self._ranks if unit in self._wants[r])
        for rank in active:
            waits = self._needs[rank] is not None and rank not in takers
            self._num_passed_over[rank] = waits * (self._num_passed_over[rank] + 1)
        for rank in takers:
            self._forget(rank, unit)
        self._last = takers
        return unit, takers

    def _is_active(self, rank: int) -> bool:
        waits = self._needs[rank] is not None
        return not self._has_left[rank] and (self._works[rank] or waits)

    def _forget(self, rank: int, unit: int) -> None:
        self._wants[rank].pop(unit, None)
        if self._needs[rank] == unit:
            self._needs[rank] = None

    def _wanted_by_all(self, active: Sequence[int]) -> int | None:
        needed = [self._needs[rank] for rank in active]
        for unit in (*needed, *self._wants[active[0]]):
            if unit is not None and all(unit in self._wants[r] for r in active):
                return unit
        return None

    def _most_needed(self, active: Sequence[int]) -> int:
        def worth(rank: int) -> tuple[bool, int, bool]:
            is_due = self._num_passed_over[rank] > self._patience
            unit = self._needs[rank]
            num = sum(unit in self._wants[other] for other in active)
            return is_due, num, rank in self._last

        found = self._needs[max(active, key=worth)]
        assert found is not None, "all of them stand still"
        return found

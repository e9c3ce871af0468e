"""Which experts micro-batches have chosen, and how often experts are used. Pure.

A *window* is a site whose units, *pieces*, are experts: each micro-batch needs some of
them. They are known once its router has run. Until then all of a window are expected
where nearly all of the last layer's experts were chosen, and none elsewhere.
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

ALWAYS = 256
"""The worth of a unit that every pass needs."""
_ALL_ABOVE = 10 / 11
"""If more than this share of a layer's pieces was chosen, all of the next layer's are
loaded ahead: at most a tenth more bytes than needed."""
_DECAY = 8
"""A piece's worth is its use in about so many passes."""


class Routing:
    """Knows the choices of one model. `stacks` are the layers' windows, by site: the
    pieces of each. `nbytes` are the stored bytes of units."""

    def __init__(
        self,
        stacks: Sequence[Mapping[int, tuple[int, ...]]],
        nbytes: Sequence[int],
    ) -> None:
        self._stacks = stacks
        self._nbytes = nbytes
        self._stack_of = {site: i for i, stack in enumerate(stacks) for site in stack}
        self._asked: dict[int, Counter[int]] = {}
        """How many micro-batches need each piece of a window, by site. Windows that
        none needs are not there."""
        self._share = 0.0
        """The share of the last layer's pieces that were chosen."""
        self._worth = {u: ALWAYS for s in stacks for units in s.values() for u in units}
        self._at: tuple[int, int] | None = None
        """The stack and the window that were opened last."""
        self._used: set[int] = set()
        """The pieces that were used since then."""
        self.touched_bytes = 0
        """Bytes of the pieces that were used: once each time that a window is open."""
        self.loaded_bytes = 0
        """Bytes of the pieces that were loaded."""

    def __bool__(self) -> bool:
        return bool(self._stacks)

    def is_window(self, site: int) -> bool:
        return site in self._stack_of

    def ask(self, needs: Mapping[int, tuple[int, ...]]) -> None:
        """A micro-batch has chosen these pieces, by window."""
        for site, units in needs.items():
            if units:
                self._asked.setdefault(site, Counter()).update(units)

    def withdraw(self, site: int, units: Iterable[int]) -> None:
        """A micro-batch is done with these pieces of a window, or has failed."""
        asked = self._asked.get(site, Counter())
        asked.subtract(units)
        for unit in [unit for unit, num in asked.items() if num <= 0]:
            del asked[unit]
        if not asked:
            self._asked.pop(site, None)

    def forget(self) -> None:
        """No micro-batch is inside of a layer any more."""
        self._asked.clear()

    @property
    def asked_windows(self) -> set[int]:
        """The windows that micro-batches need, as far as is known."""
        return set(self._asked)

    def expected(self, site: int) -> tuple[int, ...]:
        """The pieces of a window to load ahead, in order."""
        units = self._stacks[self._stack_of[site]][site]
        asked = self._asked.get(site)
        if asked is not None:
            return tuple(unit for unit in units if unit in asked)
        return units if self._share > _ALL_ABOVE else ()

    def open(self, site: int) -> None:
        """A window is opened: all that wait for it have asked."""
        index = self._stack_of[site]
        self._used.clear()
        is_first = self._at is None or self._at[0] != index or site <= self._at[1]
        self._at = index, site
        if is_first:
            self._learn(self._stacks[index])

    def use(self, unit: int) -> None:
        """A piece of the open window is computed with."""
        if unit not in self._used:
            self._used.add(unit)
            self.touched_bytes += self._nbytes[unit]

    def load(self, unit: int) -> None:
        """A unit is being loaded."""
        if unit in self._worth:
            self.loaded_bytes += self._nbytes[unit]

    def worth(self, unit: int) -> int:
        """How often a unit is used: 1 (hardly) to `ALWAYS` (in each pass)."""
        return self._worth.get(unit, ALWAYS)

    def _learn(self, stack: Mapping[int, tuple[int, ...]]) -> None:
        """Learns from the choices of all micro-batches that have come to `stack`."""
        num, chosen = 0, 0
        for site, units in stack.items():
            asked = self._asked.get(site, Counter[int]())
            for unit in units:
                now = ALWAYS if unit in asked else 0
                step = (now - self._worth[unit]) // _DECAY
                self._worth[unit] = max(1, self._worth[unit] + step)
                num, chosen = num + 1, chosen + (unit in asked)
        self._share = chosen / max(1, num)

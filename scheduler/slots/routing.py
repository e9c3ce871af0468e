"""Which experts micro-batches have chosen, and how often experts are used. Pure.

A *window* is a site whose units, *pieces*, are experts: each micro-batch needs some of
them. They are known once its router has run. Until then all of a window are expected
where nearly all of the last layer's experts were chosen, and none elsewhere.

Where a GPU computes, the CPU may compute pieces that lie in host memory: those that few
tokens chose are not loaded. That is decided when their window is opened, for all
micro-batches that wait for it.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

ALWAYS = 256
"""The worth of a unit that every pass needs."""
_ALL_ABOVE = 10 / 11
"""If more than this share of a layer's pieces was chosen, all of the next layer's are
loaded ahead: at most a tenth more bytes than needed."""
_DECAY = 8
"""A piece's worth is its use in about so many passes."""


Holds = Callable[[int], bool]
"""Says whether a unit has a slot."""


def _none(unit: int) -> bool:
    return False


@dataclass(slots=True)
class HostCounts:
    """What the CPU has computed beside the device."""

    num_calls: int = 0
    """How often an expert was computed for the tokens of a micro-batch."""
    num_tokens: int = 0
    """Tokens of these calls; a token counts for each of its experts."""
    nbytes: int = 0
    """Stored bytes that were not loaded: once each time that a window is open."""
    num_exchanged: int = 0
    """Units that have taken another's place in host memory."""


class Routing:
    """Knows the choices of one model. `stacks` are the layers' windows, by site: the
    pieces of each. `nbytes` are the stored bytes of units. Pieces that fewer tokens
    chose than `least_tokens` says are computed on the host; all others are loaded."""

    def __init__(
        self,
        stacks: Sequence[Mapping[int, tuple[int, ...]]],
        nbytes: Sequence[int],
        least_tokens: Mapping[int, int] | None = None,
    ) -> None:
        self._stacks = stacks
        self._nbytes = nbytes
        self._least_tokens = {} if least_tokens is None else least_tokens
        self._stack_of = {site: i for i, stack in enumerate(stacks) for site in stack}
        self._asked: dict[int, Counter[int]] = {}
        """How many micro-batches need each piece of a window, by site. Windows that
        none needs are not there."""
        self._tokens: Counter[int] = Counter()
        """How many tokens have chosen each piece; one counts for each of its experts
        there."""
        self._on_host: frozenset[int] = frozenset()
        """The pieces of the open window that are computed on the host."""
        self._share = 0.0
        """The share of the last layer's pieces that were chosen, and not computed on
        the host."""
        self._worth = {u: ALWAYS for s in stacks for units in s.values() for u in units}
        self._at: tuple[int, int] | None = None
        """The stack and the window that were opened last."""
        self._used: set[int] = set()
        """The pieces that were used since then."""
        self.touched_bytes = 0
        """Bytes of the pieces that were used: once each time that a window is open."""
        self.loaded_bytes = 0
        """Bytes of the pieces that were loaded."""
        self.on_host = HostCounts()

    def __bool__(self) -> bool:
        return bool(self._stacks)

    def is_window(self, site: int) -> bool:
        return site in self._stack_of

    def ask(self, needs: Mapping[int, Mapping[int, int]]) -> None:
        """A micro-batch has chosen these pieces, by window, each by so many tokens."""
        for site, tokens in needs.items():
            if tokens:
                self._asked.setdefault(site, Counter()).update(tokens.keys())
                self._tokens.update(tokens)

    def withdraw(self, site: int, tokens: Mapping[int, int]) -> None:
        """A micro-batch is done with these pieces of a window, or has failed."""
        asked = self._asked.get(site, Counter())
        asked.subtract(tokens.keys())
        self._tokens.subtract(tokens)
        for unit in [unit for unit, num in asked.items() if num <= 0]:
            del asked[unit]
            del self._tokens[unit]
        if not asked:
            self._asked.pop(site, None)

    def forget(self) -> None:
        """No micro-batch is inside of a layer any more."""
        self._asked.clear()
        self._tokens.clear()

    @property
    def asked_windows(self) -> set[int]:
        """The windows that micro-batches need, as far as is known."""
        return set(self._asked)

    def expected(self, site: int, holds: Holds = _none) -> tuple[int, ...]:
        """The pieces of a window to load ahead, in order."""
        units = self._stacks[self._stack_of[site]][site]
        asked = self._asked.get(site)
        if asked is not None:
            is_open = self._at is not None and self._at[1] == site
            out = self._on_host if is_open else self._stay_out(site, holds)
            return tuple(unit for unit in units if unit in asked and unit not in out)
        return units if self._share > _ALL_ABOVE else ()

    def open(self, site: int, holds: Holds = _none) -> None:
        """A window is opened: all that wait for it have asked."""
        index = self._stack_of[site]
        self._used.clear()
        is_first = self._at is None or self._at[0] != index or site <= self._at[1]
        self._at = index, site
        self._on_host = self._stay_out(site, holds)
        if is_first:
            self._learn(self._stacks[index], holds)

    def is_on_host(self, unit: int) -> bool:
        """Whether a piece of the open window is computed on the host."""
        return unit in self._on_host

    def hottest_on_host(self) -> tuple[int, ...]:
        """The piece of the open window that is used most among those that are computed
        on the host: it had better have a slot."""
        return tuple(sorted(self._on_host, key=lambda u: (-self._worth[u], u))[:1])

    def use_on_host(self, unit: int, num_experts: int, num_tokens: int) -> None:
        """The host computes so many experts of a piece of the open window, for so many
        tokens."""
        self.on_host.num_calls += num_experts
        self.on_host.num_tokens += num_tokens
        if unit not in self._used:
            self._used.add(unit)
            self.on_host.nbytes += self._nbytes[unit]

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

    def exchange(
        self, inside: Iterable[int], outside: Iterable[int]
    ) -> tuple[int, int] | None:
        """Which unit `inside` of a faster memory is to give its place to which one
        `outside`: the least used to the most used, if that is worth so much more that
        reading it pays."""
        old = min(inside, key=lambda unit: (self._worth[unit], unit), default=None)
        new = min(outside, key=lambda unit: (-self._worth[unit], unit), default=None)
        if old is None or new is None:
            return None
        least = 2 * self._worth[old] + ALWAYS // _DECAY
        return (old, new) if self._worth[new] >= least else None

    def _stay_out(self, site: int, holds: Holds) -> frozenset[int]:
        """The chosen pieces of a window that are not worth loading: too few tokens
        chose them, and they have no slot yet."""
        if not self._least_tokens:
            return frozenset()
        return frozenset(
            unit
            for unit in self._asked.get(site, ())
            if self._tokens[unit] < self._least_tokens.get(unit, 0) and not holds(unit)
        )

    def _learn(self, stack: Mapping[int, tuple[int, ...]], holds: Holds) -> None:
        """Learns from the choices of all micro-batches that have come to `stack`."""
        num, loaded = 0, 0
        for site, units in stack.items():
            asked = self._asked.get(site, Counter[int]())
            out = self._stay_out(site, holds)
            for unit in units:
                now = ALWAYS if unit in asked else 0
                step = (now - self._worth[unit]) // _DECAY
                self._worth[unit] = max(1, self._worth[unit] + step)
                num, loaded = num + 1, loaded + (unit in asked and unit not in out)
        self._share = loaded / max(1, num)

"""How many micro-batches may be in flight, from the memory that each keeps alive. Pure.

A suspended micro-batch holds its inputs, hidden states and masks; the caches of a model
that generates grow with every block. The first micro-batch serves as a scout: it runs
two sites ahead of the others. Its growth over the second site is taken as the growth at
each later site, which gives the memory that every micro-batch will need.
"""

from collections.abc import Callable

# A greenlet's saved stack (10 KB, measured), frames and random state (5 KB).
_OVERHEAD_BYTES = 16 << 10
# Keys and values of one block take at most twice the bytes of its hidden states.
_MOST_GROWTH = 2

Width = int | Callable[[], bool] | None


class Admission:
    """Bounds the micro-batches in flight in two ways: by `width` (a number, or a
    function that says whether the next one may start) and by `activation_bytes`, which
    all of them may hold together. None is no bound.

    The caller measures `held_bytes` when `wants` says so, and reports it by `note`.
    Batches differ in size: all are assumed to be as large as the largest one seen.
    """

    def __init__(
        self, *, width: Width, activation_bytes: int | None, num_sites: int
    ) -> None:
        self._width = width
        self._activation_bytes = activation_bytes
        self._num_sites = num_sites
        self._scout: int | None = None
        self._scout_bytes = 0
        self._start_bytes = 0
        self._growth = 1.0 + _MOST_GROWTH * num_sites
        self.is_settled = False
        self.largest_held_bytes = 0
        """The most bytes that any micro-batch was seen to hold."""

    def has_room(self, num_in_flight: int) -> bool:
        """Whether one more may start beside `num_in_flight`."""
        if isinstance(self._width, int):
            if num_in_flight >= self._width:
                return False
        elif self._width is not None and not self._width():
            return False
        if self._activation_bytes is None or num_in_flight == 0:
            return True
        if not self._start_bytes:  # the scout was not measured yet
            return False
        each = self._start_bytes * self._growth + _OVERHEAD_BYTES
        return (num_in_flight + 1) * each <= self._activation_bytes

    def wants(self, index: int, num_sites: int) -> bool:
        """Whether to measure what micro-batch `index` holds at its `num_sites`-th site.
        The scout is measured early and then at each power of two, since caches grow.
        Any other is measured once, when it holds hidden states, if there is a bound."""
        if self._scout in (None, index):
            return num_sites == 3 or num_sites.bit_count() == 1
        return num_sites == 2 and self._activation_bytes is not None

    def note(self, index: int, num_sites: int, held_bytes: int) -> None:
        """Notes that micro-batch `index` holds this much at its `num_sites`-th site."""
        self.largest_held_bytes = max(self.largest_held_bytes, held_bytes)
        if num_sites == 2:
            self._start_bytes = max(self._start_bytes, held_bytes, 1)
            if self._scout in (None, index):
                self._scout, self._scout_bytes = index, max(held_bytes, 1)
        elif num_sites > 2 and index == self._scout:
            self._note_growth(num_sites, held_bytes)

    def finish(self, index: int, *, failed: bool) -> None:
        """Micro-batch `index` has ended. If it was the scout, the next one measured
        becomes the scout."""
        if index == self._scout:
            self._scout = None
            if not failed:
                self._settle(1.0)

    def _note_growth(self, num_sites: int, held_bytes: int) -> None:
        full = held_bytes
        if num_sites == 3:
            grown = max(held_bytes - self._scout_bytes, 0)
            full += grown * max(self._num_sites - 3, 0)
        self._settle(full / self._scout_bytes)

    def _settle(self, growth: float) -> None:
        """The first measured growth replaces the guess; later ones only raise it."""
        self._growth = max(self._growth, growth) if self.is_settled else growth
        self._growth = max(self._growth, 1.0)
        self.is_settled = True

"""How many micro-batches may be in flight, by what they keep alive. Pure.

A micro-batch that waits holds its inputs, hidden states and masks; the caches of a
model that generates grow with every block. What all of them will hold is worked out
from a scout, the first one: it goes ahead by two sites, the growth over the second is
taken for that of every site to come.
"""

from collections.abc import Callable

# A micro-batch's saved stack (10 KB, measured), frames and random state (5 KB).
_OVERHEAD_BYTES = 16 << 10
# Keys and values of one block hold at most twice what its hidden states do.
_MOST_GROWTH = 2

Width = int | Callable[[], bool] | None


class Admission:
    """Bounds the micro-batches in flight: by `width` (a number, or what says whether
    the next one may start), and by `activation_bytes` for what they hold together. None
    bounds nothing.

    `held_bytes` of a micro-batch at its n-th site come in through `note`, as often as
    `wants` says. Batches differ: all are taken to be like the largest seen.
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
        """The most that any micro-batch was seen to keep."""

    def has_room(self, num_in_flight: int) -> bool:
        """Whether one more may start beside `num_in_flight`."""
        if isinstance(self._width, int):
            if num_in_flight >= self._width:
                return False
        elif self._width is not None and not self._width():
            return False
        if self._activation_bytes is None or num_in_flight == 0:
            return True
        if not self._start_bytes:  # the scout has not yet shown what it keeps
            return False
        each = self._start_bytes * self._growth + _OVERHEAD_BYTES
        return (num_in_flight + 1) * each <= self._activation_bytes

    def wants(self, index: int, num_sites: int) -> bool:
        """Whether to look at what micro-batch `index` holds at its `num_sites`-th
        site: the scout early and then now and then, since caches grow; others, where
        it matters how large they are, once they hold hidden states."""
        if self._scout in (None, index):
            return num_sites == 3 or num_sites.bit_count() == 1
        return num_sites == 2 and self._activation_bytes is not None

    def note(self, index: int, num_sites: int, held_bytes: int) -> None:
        """Micro-batch `index` waits at its `num_sites`-th site and holds this much."""
        self.largest_held_bytes = max(self.largest_held_bytes, held_bytes)
        if num_sites == 2:
            self._start_bytes = max(self._start_bytes, held_bytes, 1)
            if self._scout in (None, index):
                self._scout, self._scout_bytes = index, max(held_bytes, 1)
        elif num_sites > 2 and index == self._scout:
            self._note_growth(num_sites, held_bytes)

    def finish(self, index: int, *, failed: bool) -> None:
        """Micro-batch `index` has ended: what it did not show, another one will."""
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
        """The first look replaces the guess, later ones can only add to it."""
        self._growth = max(self._growth, growth) if self.is_settled else growth
        self._growth = max(self._growth, 1.0)
        self.is_settled = True

"""The micro-batches that stand inside of an open site, at a row-wise module, until all
who are on their way there have come."""

from collections import deque
from collections.abc import Hashable

from ..order import Order
from .micro_batch import MicroBatch
from .row_call import RowCall

Key = tuple[int, Hashable]
"""A module's number, and what else calls must have in common to be made at once."""


class CoalescingQueue:
    """Knows who is parked where, and who has what it was parked for."""

    def __init__(self, order: Order) -> None:
        self._order = order
        self._steps: set[tuple[int | None, int]] = set()
        self._calls: dict[Key, deque[RowCall]] = {}
        self._ready: deque[MicroBatch] = deque()
        self.num_rows = 0
        """Of all who are parked."""

    def __bool__(self) -> bool:
        """Whether anybody stands here, with or without what it came for."""
        return bool(self._calls or self._ready)

    def observe(self, me: MicroBatch, module: int) -> None:
        """`me` calls `module`: learns what follows what."""
        step = (me.last_module, module)
        is_repeat = module in me.called
        me.last_module = module
        me.called.add(module)
        if step not in self._steps:  # most are known: an order is slow to ask
            self._steps.add(step)
            self._order.observe(*step, is_repeat=is_repeat)

    def add(self, key: Key, call: RowCall) -> None:
        self._calls.setdefault(key, deque()).append(call)
        self.num_rows += call.num_rows

    def make_ready(self, me: MicroBatch) -> None:
        """`me` has what it was parked for."""
        self._ready.append(me)

    @property
    def has_ready(self) -> bool:
        return bool(self._ready)

    def take_ready(self) -> MicroBatch:
        return self._ready.popleft()

    def earliest(self) -> Key | None:
        """Where the next call is to be made: at the module that comes first, so that
        who is behind catches up with the others. None if nobody is parked."""
        if not self._calls:
            return None
        if len(self._calls) == 1:
            return next(iter(self._calls))
        module = self._order.nearest(None, {module for module, _ in self._calls})
        return next(key for key in self._calls if key[0] == module)

    def take(self, key: Key, max_rows: int) -> list[RowCall]:
        """Those who have come there, the first ones if they have more rows."""
        calls, taken, num_rows = self._calls[key], list[RowCall](), 0
        while calls and (not taken or num_rows + calls[0].num_rows <= max_rows):
            num_rows += calls[0].num_rows
            taken.append(calls.popleft())
        if not calls:
            del self._calls[key]
        self.num_rows -= num_rows
        return taken

    def clear(self) -> None:
        self._calls.clear()
        self._ready.clear()
        self.num_rows = 0

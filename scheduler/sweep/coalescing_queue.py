"""The calls that parked micro-batches have made of row-wise modules, and that wait to
be joined with those of others."""

from collections import deque
from collections.abc import Hashable

from ..order import Order
from .micro_batch import MicroBatch
from .row_call import RowCall

Key = tuple[int, Hashable]
"""A module's number, and what else calls must have in common to be joined."""


class CoalescingQueue:
    """The waiting calls by key, and the micro-batches that are ready to continue.
    `order` learns in which order modules are called."""

    def __init__(self, order: Order) -> None:
        self._order = order
        self._steps: set[tuple[int | None, int]] = set()
        self._calls: dict[Key, deque[RowCall]] = {}
        self._ready: deque[MicroBatch] = deque()
        self.num_rows = 0
        """Rows of all waiting calls together."""

    def __bool__(self) -> bool:
        """Whether any micro-batch is parked, ready to continue or not."""
        return bool(self._calls or self._ready)

    def observe(self, me: MicroBatch, module: int) -> None:
        """Learns from `me`, which calls `module`, which module follows which."""
        step = (me.last_module, module)
        is_repeat = module in me.called
        me.last_module = module
        me.called.add(module)
        if step not in self._steps:  # `Order.observe` is slow, and most are known
            self._steps.add(step)
            self._order.observe(*step, is_repeat=is_repeat)

    def add(self, key: Key, call: RowCall) -> None:
        self._calls.setdefault(key, deque()).append(call)
        self.num_rows += call.num_rows

    def make_ready(self, me: MicroBatch) -> None:
        """`me` may continue."""
        self._ready.append(me)

    @property
    def has_ready(self) -> bool:
        return bool(self._ready)

    def take_ready(self) -> MicroBatch:
        return self._ready.popleft()

    def earliest(self) -> Key | None:
        """The key of the calls to join next: those of the module that comes first in
        the model, so that the micro-batches that are behind catch up with the others.
        None if no call waits."""
        if not self._calls:
            return None
        if len(self._calls) == 1:
            return next(iter(self._calls))
        module = self._order.nearest(None, {module for module, _ in self._calls})
        return next(key for key in self._calls if key[0] == module)

    def take(self, key: Key, max_rows: int) -> list[RowCall]:
        """Removes and returns the calls of `key`, in the order in which they came, up
        to `max_rows` rows but at least one call."""
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

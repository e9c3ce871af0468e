"""Makes the calls that many micro-batches have for one row-wise module into one call.

In decode each micro-batch has a few rows, and a product of few rows takes almost as
long as one of many. So whoever comes to such a module inside of an open site is parked
there; once nobody else is on the way, one of them takes the rows of all through it.
Python of the model stays as it is: products are shared, and MLPs that keep rows apart.
"""

import functools
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn.modules.module import _global_forward_hooks as _global_hooks
from torch.nn.modules.module import _global_forward_pre_hooks as _global_pre_hooks

from ..joint_rows import MAX_ROWS, WIDE_ROWS
from ..order import Order
from .micro_batch import MicroBatch
from .parked import CoalescingQueue
from .row_call import Forward, RowCall, call_together, key_of, num_rows_of

if TYPE_CHECKING:
    from .loop import SweepLoop

_log = logging.getLogger("penstock")

# The rows of all are copied together, and their outputs apart; what a whole MLP makes
# in between is a few times as wide.
MAX_OUTPUT_BYTES = 64 << 20


@dataclass(frozen=True, slots=True)
class RowWise:
    """A module whose forward takes rows to rows. One may be a part of another: then
    it is called for many at once with the other, or by itself."""

    module: nn.Module
    num_args: int
    """Tensors that it is called with, each with a row for each row of the output."""
    parts: tuple[nn.Module, ...] = ()
    """Modules in it that are called with the rows of all when it is."""

    @property
    def is_as_found(self) -> bool:
        """Whether nobody has come who would see, or draw for, the rows of all in place
        of each one's own: hooks, another forward, another part, the training mode."""
        if "forward" in vars(self.module):
            return False
        if not self.parts:
            return True
        return (
            not (_global_hooks or _global_pre_hooks or self.module.training)
            and tuple(self.module.modules())[1:] == self.parts
            and not any(
                part._forward_hooks
                or part._forward_pre_hooks
                or part.training
                or "forward" in vars(part)
                for part in self.parts
            )
        )


@dataclass(frozen=True, slots=True)
class CoalescingStatistics:
    """Counters since the sweep was opened."""

    num_calls: int = 0
    """Calls that were made for several micro-batches at once."""
    num_rows: int = 0
    """That went through modules in these calls."""
    num_failed: int = 0
    """Such calls that failed, and were then made for each micro-batch by itself."""


class Coalescing:
    """Replaces the forward of row-wise modules from `start` to `stop`, the time that
    one hub runs. A call from elsewhere, one that records gradients and one of
    `WIDE_ROWS` or more is let through.

    `order` learns in which order the modules are called. Each is called by one of those
    who are parked at it, in its own greenlet and under its own thread state; `key_of`
    sees to it that the others' are the same.
    """

    def __init__(self, modules: Sequence[RowWise], order: Order) -> None:
        self._modules = modules
        self._parked = CoalescingQueue(order)
        self._hub: SweepLoop | None = None
        self._leader: MicroBatch | None = None
        """Who is taking the rows of several through a module just now."""
        self._replaced: list[tuple[nn.Module, Any]] = []
        self._max_rows: dict[int, int] = {}
        """By module, once it is known how long a row of its output is."""
        self._num_calls = 0
        self._num_rows = 0
        self._num_failed = 0

    def start(self, hub: "SweepLoop") -> None:
        """`hub` begins to run micro-batches."""
        self._hub = hub
        # Before any is replaced: ours are nobody else's.
        wanted = [found.is_as_found for found in self._modules]
        for index, found in enumerate(self._modules):
            if not wanted[index]:
                continue
            module = found.module
            forward = self._forward(index, module.forward, found.num_args)
            self._replaced.append((module, forward))
            module.forward = forward

    def stop(self, hub: "SweepLoop | None" = None) -> None:
        """Puts back what `start` replaced. Harmless at any time, and twice; also if it
        was started for another hub than `hub`."""
        if hub not in (None, self._hub):
            return
        self._parked.clear()
        for module, forward in self._replaced:
            if vars(module).get("forward") is forward:
                del module.forward
        self._replaced.clear()
        self._hub = None

    def clear(self, hub: "SweepLoop") -> None:
        """Those who are parked are about to end."""
        if hub is self._hub:
            self._parked.clear()

    def next(self, *, others_come: bool) -> MicroBatch | None:
        """Who of those that are parked is to run on; None to let others come first, of
        whom there are some (`others_come`), or because nobody is parked."""
        parked = self._parked
        may_wait = others_come and parked.num_rows < MAX_ROWS
        if not parked.has_ready and parked.num_rows and not may_wait:
            self._choose()
        return parked.take_ready() if parked.has_ready else None

    def statistics(self) -> CoalescingStatistics:
        return CoalescingStatistics(self._num_calls, self._num_rows, self._num_failed)

    def _forward(self, index: int, original: Forward, num_args: int) -> Forward:
        @functools.wraps(original)
        def forward(*args: Any, **kwargs: Any) -> Any:
            if kwargs or len(args) != num_args or torch.is_grad_enabled():
                return original(*args, **kwargs)
            return self._call(index, original, args)

        return forward

    def _call(self, index: int, original: Forward, args: tuple[Any, ...]) -> Any:
        hub = self._hub
        if hub is None or not hub.is_running_here():
            return original(*args)
        me = hub.running
        if me is self._leader or not me.inside or me.records_gradients:
            return original(*args)
        num_rows = num_rows_of(args)
        self._parked.observe(me, index)
        is_alone = not self._parked and not hub.others_come
        if is_alone or not 0 < num_rows < WIDE_ROWS:
            return original(*args)
        call = RowCall(me, args, num_rows)
        self._parked.add((index, (me.inside[-1], key_of(args))), call)
        if not self._parked.has_ready and not hub.others_come:
            self._choose(call)
        if not call.together:
            hub.park(index)
        if call.together:
            self._call_together(index, original, call)
        if call.is_alone:
            return original(*args)
        return call.output

    def _choose(self, caller: RowCall | None = None) -> None:
        """Whose rows are next. Who came first takes them through the module, and all go
        on in the order in which they came: what they will need is fetched in it."""
        key = self._parked.earliest()
        assert key is not None, "only who is parked can be chosen"
        calls = self._parked.take(key, self._max_rows.get(key[0], MAX_ROWS))
        leader = calls[0]
        leader.together = calls
        if leader is not caller:
            self._parked.make_ready(leader.me)

    def _call_together(self, index: int, original: Forward, call: RowCall) -> None:
        calls, call.together = call.together, []
        if len(calls) == 1:
            call.is_alone = True
            return
        self._leader = call.me
        try:
            row_bytes = call_together(calls, original)
        except Exception as error:
            # One may be to blame, or their being many: each is to see for itself.
            if not self._num_failed:
                kind = type(self._modules[index].module).__name__
                _log.warning("a joint call of a %s failed: %r; each alone", kind, error)
            self._num_failed += 1
            for each in calls:
                each.is_alone = True
        else:
            self._num_calls += 1
            self._num_rows += sum(each.num_rows for each in calls)
            self._max_rows[index] = min(MAX_ROWS, MAX_OUTPUT_BYTES // (row_bytes or 1))
        finally:
            self._leader = None
        for each in calls:
            if each is not call:
                self._parked.make_ready(each.me)

"""Joins the calls that several micro-batches make of one row-wise module into one call.

In decode each micro-batch has few rows, and a matrix product of few rows takes almost
as long as one of many rows. So a micro-batch that reaches such a module inside an open
site is parked there. Once no other micro-batch can still reach it, one of the parked
ones calls the module with the rows of all. The model's own Python code still runs for
each micro-batch; only linear layers and row-wise MLPs are called jointly.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import nn
from torch.nn.modules.module import _global_forward_hooks as _global_hooks
from torch.nn.modules.module import _global_forward_pre_hooks as _global_pre_hooks

from ...io.fallbacks import Fallbacks
from ...io.merging import Rule, counter
from ..order import Order
from ..packing import MAX_ROWS, WIDE_ROWS
from .coalescing_queue import CoalescingQueue
from .micro_batch import MicroBatch
from .row_call import Forward, RowCall, call_together, key_of, num_rows_of

# A bound for the output of one joint call. The intermediate values of an MLP take a few
# times as much, and the inputs and outputs are copied.
MAX_OUTPUT_BYTES = 64 << 20


@dataclass(frozen=True, slots=True)
class RowWise:
    """A module that computes each row of its output from the same row of its inputs
    alone. It may contain other such modules, which a joint call then includes."""

    module: nn.Module
    num_args: int
    """The number of tensors that it takes; all have as many rows as the output."""
    parts: tuple[nn.Module, ...] = ()
    """The modules inside it."""

    @property
    def is_unmodified(self) -> bool:
        """Whether a joint call is safe: nothing was added since the module was found
        row-wise that would see the rows of all micro-batches, or draw random numbers
        for them (hooks, another forward, another submodule, training mode)."""
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


@dataclass(frozen=True, kw_only=True)
class CoalescingStatistics:
    """Counters since the sweep was opened."""

    num_joint_calls: int = counter(Rule.SUM)
    """Calls of a row-wise module that were made jointly for several micro-batches."""
    num_joint_rows: int = counter(Rule.SUM)
    """Rows in all joint calls together."""
    num_failed_joint_calls: int = counter(Rule.SUM)
    """Joint calls that failed and were repeated for each micro-batch by itself."""


class ParkingLoop(Protocol):
    """A sweep loop, as Coalescing sees it; `SweepLoop` describes the members."""

    @property
    def running(self) -> MicroBatch: ...

    @property
    def others_come(self) -> bool: ...

    def is_running_here(self) -> bool: ...

    def park(self, place: int) -> None: ...


class Coalescing:
    """Replaces the forward of row-wise modules from `start` to `stop`, while one sweep
    loop runs. A call is not joined if it comes from outside the loop, records gradients
    or has `WIDE_ROWS` rows or more.

    `order` learns in which order the modules are called. One parked micro-batch makes
    the joint call, in its greenlet and under its thread state. `key_of` ensures that
    the state of the others is the same.
    """

    def __init__(
        self, modules: Sequence[RowWise], order: Order, fallbacks: Fallbacks
    ) -> None:
        self._modules = modules
        self._queue = CoalescingQueue(order)
        self._fallbacks = fallbacks
        self._loop: ParkingLoop | None = None
        self._leader: MicroBatch | None = None
        """The micro-batch that is making a joint call now."""
        self._replaced: list[tuple[nn.Module, Any]] = []
        self._max_rows: dict[int, int] = {}
        """The most rows of a joint call, by module number; set by its first one."""
        self._num_calls = 0
        self._num_rows = 0
        self._num_failed = 0

    def start(self, loop: ParkingLoop) -> None:
        """Replaces the forwards: `loop` begins to run micro-batches."""
        self._loop = loop
        # All are checked before any is replaced: the new forward of a module would look
        # like a change by the user to the module that contains it.
        are_unmodified = [row_wise.is_unmodified for row_wise in self._modules]
        for index, row_wise in enumerate(self._modules):
            if not are_unmodified[index]:
                continue
            module = row_wise.module
            forward = self._forward(index, module.forward, row_wise.num_args)
            self._replaced.append((module, forward))
            module.forward = forward

    @property
    def is_joining(self) -> bool:
        """Whether calls of any module may be joined now."""
        return bool(self._replaced)

    def stop(self, loop: ParkingLoop | None = None) -> None:
        """Restores the forwards that `start` replaced. May be called at any time and
        repeatedly. Does nothing if another loop than `loop` is running."""
        if loop not in (None, self._loop):
            return
        self._queue.clear()
        for module, forward in self._replaced:
            if vars(module).get("forward") is forward:
                del module.forward
        self._replaced.clear()
        self._loop = None

    def clear(self, loop: ParkingLoop) -> None:
        """Forgets the parked micro-batches, which are about to end."""
        if loop is self._loop:
            self._queue.clear()

    def next(self, *, others_come: bool) -> MicroBatch | None:
        """The parked micro-batch that is to continue. None if none is parked, or if it
        is better to wait for others, which exist if `others_come`."""
        queue = self._queue
        may_wait = others_come and queue.num_rows < MAX_ROWS
        if not queue.has_ready and queue.num_rows and not may_wait:
            self._choose()
        return queue.take_ready() if queue.has_ready else None

    def statistics(self) -> CoalescingStatistics:
        return CoalescingStatistics(
            num_joint_calls=self._num_calls,
            num_joint_rows=self._num_rows,
            num_failed_joint_calls=self._num_failed,
        )

    def _forward(self, index: int, original: Forward, num_args: int) -> Forward:
        @functools.wraps(original)
        def forward(*args: Any, **kwargs: Any) -> Any:
            if kwargs or len(args) != num_args or torch.is_grad_enabled():
                return original(*args, **kwargs)
            return self._call(index, original, args)

        return forward

    def _call(self, index: int, original: Forward, args: tuple[Any, ...]) -> Any:
        loop = self._loop
        if loop is None or not loop.is_running_here():
            return original(*args)
        me = loop.running
        if me is self._leader or not me.inside or me.records_gradients:
            return original(*args)
        num_rows = num_rows_of(args)
        self._queue.observe(me, index)
        is_alone = not self._queue and not loop.others_come
        if is_alone or not 0 < num_rows < WIDE_ROWS:
            return original(*args)
        call = RowCall(me, args, num_rows)
        self._queue.add((index, (me.inside[-1], key_of(args))), call)
        if not self._queue.has_ready and not loop.others_come:
            self._choose(call)
        if not call.together:
            loop.park(index)
        if call.together:
            self._call_together(index, original, call)
        if call.is_alone:
            return original(*args)
        return call.output

    def _choose(self, caller: RowCall | None = None) -> None:
        """Chooses the calls that are joined next. The micro-batch that came first makes
        the joint call. All continue in the order in which they came, because what they
        need next is prefetched in that order."""
        key = self._queue.earliest()
        assert key is not None, "only who is parked can be chosen"
        calls = self._queue.take(key, self._max_rows.get(key[0], MAX_ROWS))
        leader = calls[0]
        leader.together = calls
        if leader is not caller:
            self._queue.make_ready(leader.me)

    def _call_together(self, index: int, original: Forward, call: RowCall) -> None:
        calls, call.together = call.together, []
        if len(calls) == 1:
            call.is_alone = True
            return
        self._leader = call.me
        try:
            row_bytes = call_together(calls, original)
        except Exception as error:
            # One call may be wrong, or the joint call too large: repeat each alone.
            if not self._num_failed:
                kind = type(self._modules[index].module).__name__
                self._fallbacks.announce(
                    f"a joint call of a {kind} failed: {error!r}; each alone"
                )
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
                self._queue.make_ready(each.me)

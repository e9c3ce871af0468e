"""Many micro-batches through each unit while it is there: the model's own code, run in
layer-major order by cooperative switching.

Each micro-batch runs the caller's function in a greenlet. At the door of a site whose
units are not there it switches to the hub, which opens one site at a time, lets in
everybody who waits at it, and goes on to the next. Layer-major order emerges.
"""

import logging
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextvars import copy_context
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Generic, Self, TypeVar

import greenlet
import torch

from ..io.errors import ClosedError, PenstockError
from .gate import Gate
from .held import held_bytes
from .thread_state import ThreadState

Batch = TypeVar("Batch")
Result = TypeVar("Result")

_log = logging.getLogger("penstock")

# A micro-batch may catch the exit and call the model again; not for ever.
_MAX_EXITS = 100


@dataclass(frozen=True, slots=True)
class Outcome(Generic[Result]):
    """What became of one micro-batch: a value, or the error that ended it."""

    index: int
    value: Result | None
    error: Exception | None


@dataclass(frozen=True, slots=True)
class SweepStatistics:
    """What the sweep has done so far."""

    num_started: int
    num_finished: int
    max_in_flight: int
    held_bytes_per_micro_batch: int
    """Activations that the first micro-batch kept while it waited; 0 if it never did."""


@dataclass(slots=True, eq=False)
class _MicroBatch:
    index: int
    greenlet: Any
    state: ThreadState
    last: int | None = None
    inside: list[int] = field(default_factory=list)
    num_exits: int = 0
    value: Any = None
    error: BaseException | None = None


class Sweep:
    """Runs micro-batches in lock-step over one model; closed by `with`.

    `width` bounds how many are in flight; `activation_bytes` bounds what they may keep
    alive between units, measured on the first one. A finished one is replaced at once.
    """

    def __init__(
        self,
        gate: Gate,
        *,
        width: int | None,
        activation_bytes: int | None,
        seed: int | None,
        devices: tuple[str, ...],
    ) -> None:
        if width is not None and width < 1:
            raise PenstockError(f"a sweep of width {width} runs nothing: at least 1")
        self._gate = gate
        self._width = width
        self._activation_bytes = activation_bytes
        self._seed = seed
        self._devices = devices
        self._waiting: dict[int, deque[_MicroBatch]] = {}
        self._running: _MicroBatch | None = None
        self._finished: list[_MicroBatch] = []
        self._left_behind: list[_MicroBatch] = []
        self._num_started = 0
        self._num_finished = 0
        self._num_in_flight = 0
        self._max_in_flight = 0
        self._held_bytes = 0
        self._is_active = False
        self._is_stopping = False
        self._is_closed = False
        self._hub: Any = None
        self._hub_state = ThreadState(devices)

    def map(
        self,
        fn: Callable[[Batch], Result],
        batches: Iterable[Batch],
        *,
        return_exceptions: bool = False,
    ) -> list[Any]:
        """`fn(batch)` for every batch, in order. `fn` may call the model as often as
        it likes, `generate` included.

        All batches are run even if some fail. Then the first error is raised, or, with
        `return_exceptions`, errors stand in the list in place of results.
        """
        outcomes = sorted(self.run(fn, batches), key=lambda outcome: outcome.index)
        if not return_exceptions:
            failed = [o for o in outcomes if o.error is not None]
            if failed and failed[0].error is not None:
                error = failed[0].error
                error.add_note(
                    f"in micro-batch {failed[0].index}; {len(outcomes) - len(failed)} "
                    f"of {len(outcomes)} succeeded: return_exceptions=True keeps them"
                )
                raise error
        return [o.value if o.error is None else o.error for o in outcomes]

    def run(
        self, fn: Callable[[Batch], Result], batches: Iterable[Batch]
    ) -> Iterator[Outcome[Result]]:
        """Like `map`, but yields each outcome as it comes. Batches are taken from the
        iterable as places become free, so it may be lazy and longer than memory.

        Each micro-batch has its own random state, seeded by the sweep's seed plus its
        index; without a seed, by one number drawn from torch's generator.
        """
        if self._is_closed:
            raise ClosedError("this sweep is closed: open another one")
        self._gate.start_sweep(self)
        self._is_active = True
        seed = self._seed
        if seed is None:
            seed = int(torch.randint(2**31, (), device="cpu").item())
        source = enumerate(batches)
        try:
            more = True
            while more or self._num_in_flight:
                more = self._round(fn, source, seed, more)
                while self._finished:
                    yield self._outcome(self._finished.pop(0))
        finally:
            self._stop()
            self._is_active = False
            self._gate.end_sweep()

    def statistics(self) -> SweepStatistics:
        return SweepStatistics(
            self._num_started,
            self._num_finished,
            self._max_in_flight,
            self._held_bytes,
        )

    def close(self) -> None:
        """No further `run`. (One under way is stopped by leaving its loop.)"""
        self._is_closed = True

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    # What the gate calls, inside a micro-batch.

    @property
    def is_running(self) -> bool:
        """Whether a micro-batch (not the hub) has the thread."""
        return self._running is not None

    def is_running_here(self) -> bool:
        """Whether the caller is this sweep's running micro-batch."""
        running = self._running
        return running is not None and running.greenlet is greenlet.getcurrent()

    def arrive(self, site: int) -> None:
        """The running micro-batch is at `site`; returns inside, with the units there."""
        me = self._running
        assert me is not None, "only a running micro-batch arrives"
        self._exit_if_stopping(me)
        self._gate.order.observe(me.last, site)
        me.last = site
        if not self._gate.doors.is_open(site):
            self._waiting.setdefault(site, deque()).append(me)
            me.state.suspend()
            self._hub.switch()
            self._exit_if_stopping(me)
        self._gate.doors.enter(site)
        me.inside.append(site)

    def depart(self, site: int) -> None:
        """The running micro-batch has run `site`."""
        me = self._running
        assert me is not None, "only a running micro-batch departs"
        if me.inside and me.inside[-1] == site:
            me.inside.pop()
            self._gate.doors.leave(site)

    def _exit_if_stopping(self, me: _MicroBatch) -> None:
        if not self._is_stopping:
            return
        me.num_exits += 1
        if me.num_exits <= _MAX_EXITS:
            raise greenlet.GreenletExit
        _log.warning("micro-batch %d swallows its exit and is left behind", me.index)
        me.state.suspend()
        self._hub.switch()

    # The hub.

    def _round(
        self,
        fn: Callable[[Batch], Result],
        source: Iterator[tuple[int, Batch]],
        seed: int,
        more: bool,
    ) -> bool:
        """Serves one site to all who wait there; returns whether batches may be left.
        New ones start whenever there is room."""
        self._hub = greenlet.getcurrent()
        more = more and self._admit(fn, source, seed)
        if not self._waiting:
            return more
        gate = self._gate
        site = gate.next_of(set(self._waiting))
        expected = set(self._waiting)
        if more and gate.order.first is not None:
            expected.add(gate.order.first)
        gate.visit(site, expected)
        try:
            while site in self._waiting:
                self._resume(self._take(site))
                more = more and self._admit(fn, source, seed)
        finally:
            gate.doors.leave(site)
        return more

    def _take(self, site: int) -> _MicroBatch:
        queue = self._waiting[site]
        me = queue.popleft()
        if not queue:
            del self._waiting[site]
        return me

    def _admit(
        self,
        fn: Callable[[Batch], Result],
        source: Iterator[tuple[int, Batch]],
        seed: int,
    ) -> bool:
        """Starts batches while there is room; False once there are none left."""
        while self._has_room():
            try:
                index, batch = next(source)
            except StopIteration:
                return False
            self._start(index, fn, batch, seed + index)
        return True

    def _has_room(self) -> bool:
        if self._width is not None and self._num_in_flight >= self._width:
            return False
        if self._activation_bytes is None or self._num_in_flight == 0:
            return True
        if not self._held_bytes:  # the first one has not yet shown what it keeps
            return False
        return (self._num_in_flight + 1) * self._held_bytes <= self._activation_bytes

    def _start(
        self, index: int, fn: Callable[[Batch], Result], batch: Batch, seed: int
    ) -> None:
        def work() -> None:
            try:
                me.value = fn(batch)
            except greenlet.GreenletExit:
                me.error = ClosedError("the sweep was stopped before this finished")
            except BaseException as error:
                me.error = error

        flow = greenlet.greenlet(work, parent=self._hub)
        flow.gr_context = copy_context()
        me = _MicroBatch(index, flow, ThreadState(self._devices))
        self._num_started += 1
        self._num_in_flight += 1
        self._max_in_flight = max(self._max_in_flight, self._num_in_flight)
        self._switch(me, lambda: me.state.start_like(self._hub_state, seed))

    def _resume(self, me: _MicroBatch) -> None:
        me.greenlet.parent = self._hub
        self._switch(me, me.state.resume)
        if not self._held_bytes and not me.greenlet.dead:
            self._held_bytes = held_bytes(me.greenlet.gr_frame)

    def _switch(self, me: _MicroBatch, put_state: Callable[[], None]) -> None:
        """Runs `me` until it waits or ends, under its own thread state."""
        self._hub_state.suspend()
        try:
            put_state()
            self._running = me
            me.greenlet.switch()
        finally:
            self._running = None
            self._hub_state.resume()
        if me.greenlet.dead:
            self._end(me)

    def _end(self, me: _MicroBatch) -> None:
        for site in reversed(me.inside):  # a failed forward leaves without its hook
            self._gate.doors.leave(site)
        me.inside.clear()
        self._num_in_flight -= 1
        self._num_finished += 1
        if me.error is not None and not isinstance(me.error, Exception):
            raise me.error  # an interrupt is the caller's, not the micro-batch's
        self._finished.append(me)

    def _outcome(self, me: _MicroBatch) -> Outcome[Result]:
        error = me.error if isinstance(me.error, Exception) else None
        return Outcome(me.index, me.value, error)

    def _stop(self) -> None:
        """Ends what still waits: each unwinds under its own state, `finally` and all."""
        self._is_stopping = True
        self._hub = greenlet.getcurrent()
        left = [me for queue in self._waiting.values() for me in queue]
        self._waiting.clear()
        for me in left:
            self._exit(me)
            if not me.greenlet.dead:
                self._left_behind.append(me)
        self._finished.clear()
        self._is_stopping = False

    def _exit(self, me: _MicroBatch) -> None:
        self._hub_state.suspend()
        try:
            me.state.resume()
            self._running = me
            me.greenlet.parent = self._hub
            me.greenlet.throw(greenlet.GreenletExit)
        finally:
            self._running = None
            self._hub_state.resume()
        for site in reversed(me.inside):
            self._gate.doors.leave(site)
        me.inside.clear()
        self._num_in_flight -= 1

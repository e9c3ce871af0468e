"""Many micro-batches through each unit while it is there: the model's own code, run in
layer-major order by cooperative switching.

Each micro-batch runs the caller's function in a greenlet. At the door of a site whose
units are not there it switches to the hub, which opens one site at a time, lets in
everybody who waits at it, and goes on to the next. Layer-major order emerges.
"""

import logging
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from types import TracebackType
from typing import Any, Generic, Self, TypeVar

import greenlet
import torch

from ..io.errors import ClosedError, PenstockError
from .gate import Gate
from .micro_batch import MicroBatch
from .module_state import ModuleState
from .thread_state import ThreadState

Batch = TypeVar("Batch")
Result = TypeVar("Result")

_log = logging.getLogger("penstock")

# A micro-batch may catch the exit and call the model again; not for ever.
_MAX_EXITS = 100
# Waits of the first micro-batch after which the modules' state is looked at: each look
# walks the whole model, and what a model keeps shows in its first passes.
_NUM_LESSONS = 256


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
    """Activations that the first micro-batch kept while it waited."""


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
        module_state: ModuleState,
    ) -> None:
        if width is not None and width < 1:
            raise PenstockError(f"a sweep of width {width} runs nothing: at least 1")
        self._gate = gate
        self._width = width
        self._activation_bytes = activation_bytes
        self._seed = seed
        self._devices = devices
        self._module_state = module_state
        self._waiting: dict[int, deque[MicroBatch]] = {}
        self._running: MicroBatch | None = None
        self._finished: list[MicroBatch] = []
        self._left_behind: list[MicroBatch] = []
        self._num_started = 0
        self._num_finished = 0
        self._num_in_flight = 0
        self._max_in_flight = 0
        self._held_bytes = 0
        self._lessons_left = 0
        self._is_stopping = False
        self._is_closed = False
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
        self._lessons_left = _NUM_LESSONS
        seed = self._seed
        if seed is None:
            seed = int(torch.randint(2**31, (), device="cpu").item())
        job = _Job(fn, enumerate(batches), seed)
        try:
            while job.has_more or self._num_in_flight:
                with self._gate.computing():
                    self._round(job)
                while self._finished:
                    me = self._finished.pop(0)
                    error = me.error if isinstance(me.error, Exception) else None
                    yield Outcome(me.index, me.value, error)
        finally:
            self._stop()
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
        return self._running is not None and self._running.is_current

    def arrive(self, site: int) -> None:
        """The running micro-batch is at `site`: returns once it is inside."""
        me = self._running
        assert me is not None, "only a running micro-batch arrives"
        self._exit_if_stopping(me)
        self._gate.order.observe(me.last_site, site)
        me.last_site = site
        if not self._gate.doors.is_open(site):
            self._waiting.setdefault(site, deque()).append(me)
            if me.index == 0 and self._lessons_left:
                self._lessons_left -= 1
                self._module_state.learn()
            me.wait()
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

    def _exit_if_stopping(self, me: MicroBatch) -> None:
        if not self._is_stopping:
            return
        me.num_exits += 1
        if me.num_exits <= _MAX_EXITS:
            raise greenlet.GreenletExit
        _log.warning("micro-batch %d swallows its exit and is left behind", me.index)
        me.wait()

    # The hub.

    def _round(self, job: "_Job[Any, Any]") -> None:
        """Serves one site to all who wait there; new ones start when there is room."""
        self._admit(job)
        if not self._waiting:
            return
        gate = self._gate
        site = gate.next_of(set(self._waiting))
        expected = set(self._waiting)
        if job.has_more and gate.order.first is not None:
            expected.add(gate.order.first)
        gate.visit(site, expected)
        try:
            while site in self._waiting:
                self._resume(self._take(site))
                self._admit(job)
        finally:
            gate.doors.leave(site)

    def _take(self, site: int) -> MicroBatch:
        queue = self._waiting[site]
        me = queue.popleft()
        if not queue:
            del self._waiting[site]
        return me

    def _admit(self, job: "_Job[Any, Any]") -> None:
        while job.has_more and self._has_room():
            try:
                index, batch = next(job.batches)
            except StopIteration:
                job.has_more = False
                return
            self._start(job, index, batch)

    def _has_room(self) -> bool:
        if self._width is not None and self._num_in_flight >= self._width:
            return False
        if self._activation_bytes is None or self._num_in_flight == 0:
            return True
        if not self._held_bytes:  # the first one has not yet shown what it keeps
            return False
        return (self._num_in_flight + 1) * self._held_bytes <= self._activation_bytes

    def _start(self, job: "_Job[Any, Any]", index: int, batch: Any) -> None:
        me = MicroBatch(
            index,
            partial(job.fn, batch),
            devices=self._devices,
            hub_state=self._hub_state,
            module_state=self._module_state,
        )
        self._num_started += 1
        self._num_in_flight += 1
        self._max_in_flight = max(self._max_in_flight, self._num_in_flight)
        self._run(me, partial(me.start, job.seed + index))

    def _resume(self, me: MicroBatch) -> None:
        self._run(me, me.resume)
        if not self._held_bytes and not me.is_done:
            self._held_bytes = me.held_bytes()

    def _run(self, me: MicroBatch, piece: Callable[[], None]) -> None:
        self._running = me
        try:
            piece()
        finally:
            self._running = None
        if me.is_done:
            self._leave_all(me)
            self._num_finished += 1
            if me.error is not None and not isinstance(me.error, Exception):
                raise me.error  # an interrupt is the caller's, not the micro-batch's
            self._finished.append(me)

    def _leave_all(self, me: MicroBatch) -> None:
        """A failed forward leaves without its hook; nothing stays open behind it."""
        self._num_in_flight -= 1
        while me.inside:
            self._gate.doors.leave(me.inside.pop())

    def _stop(self) -> None:
        """Ends what still waits."""
        self._is_stopping = True
        left = [me for queue in self._waiting.values() for me in queue]
        self._waiting.clear()
        for me in left:
            self._running = me
            try:
                me.exit()
            finally:
                self._running = None
                self._leave_all(me)
            if not me.is_done:
                self._left_behind.append(me)
        self._waiting.clear()
        self._finished.clear()
        self._is_stopping = False


@dataclass(slots=True)
class _Job(Generic[Batch, Result]):
    """One `run`: what to do, and what is left to do it with."""

    fn: Callable[[Batch], Result]
    batches: Iterator[tuple[int, Batch]]
    seed: int
    has_more: bool = True

"""Runs many micro-batches through each unit of weights while it is loaded.

Each micro-batch runs the caller's function in a greenlet. The model's own code is run;
`loop` switches between the greenlets so that layers are the outer loop.
"""

import threading
from collections.abc import Callable, Generator, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from inspect import GEN_RUNNING, getgeneratorstate
from typing import Any, Generic, TypeVar

from ...io.closing import Closing
from ...io.errors import ClosedError, PenstockError
from ...io.merging import Rule, counter, counters_of
from ..activations.activation_offload import (
    ActivationOffload,
    ActivationOffloadStatistics,
)
from ..kv.store import KvStore
from ..ranks.lockstep import Lockstep
from ..ranks.unison import Unison
from .admission import Admission, Width
from .coalescing import Coalescing, CoalescingStatistics
from .endings import Endings
from .entry import ForwardEntry
from .loop import SweepLoop
from .module_state import ModuleState
from .ranked_loop import RankedLoop, UnisonLoop
from .side_transfers import SideTransfers
from .sweep_input import SweepInput, SweepProgress

Batch = TypeVar("Batch")
Result = TypeVar("Result")


@dataclass(frozen=True, slots=True)
class Outcome(Generic[Result]):
    """The result of one micro-batch: a value, or the error that ended it."""

    index: int
    value: Result | None
    error: Exception | None


@dataclass(frozen=True, kw_only=True)
class SweepCounters(CoalescingStatistics, ActivationOffloadStatistics):
    """What is counted for a sweep, and for all sweeps of a model together."""

    max_in_flight: int = counter(Rule.MOST)
    """The most micro-batches of a sweep in flight at one time."""
    held_bytes_per_micro_batch: int = counter(Rule.MOST)
    """The most bytes of activations that one micro-batch kept while it waited."""


@dataclass(frozen=True, kw_only=True)
class SweepStatistics(SweepCounters):
    """The counters of a sweep so far."""

    num_started: int = counter(Rule.SUM)
    num_finished: int = counter(Rule.SUM)


class Outcomes(Closing, Iterator[Outcome[Result]], Generic[Result]):
    """The outcomes that `run` yields. One thread takes them all."""

    def __init__(self, steps: Generator[Outcome[Result], None, None]) -> None:
        self._steps = steps
        self._is_closed = False

    def __next__(self) -> Outcome[Result]:
        here = threading.current_thread()
        # In one step: two threads may come at once.
        if self.__dict__.setdefault("_thread", here) is not here:
            raise PenstockError(
                "the outcomes of a sweep are taken in one thread, and another one took "
                "the first: take them all in that thread, or close the sweep and open "
                "one in this"
            )
        if self._is_closed:
            self._steps.close()
        return next(self._steps)

    def close(self) -> None:
        """Stops the run, as `Sweep.close` does; the sweep stays open for others."""
        self._is_closed = True
        if getgeneratorstate(self._steps) != GEN_RUNNING:
            self._steps.close()


class Sweep(Closing):
    """Runs micro-batches over one model, all of them through a site before the next
    site is loaded. A context manager.

    `width` bounds how many are in flight: a number, or a function that says whether the
    next one may start. `activation_bytes` bounds the memory that they keep alive
    between sites, as measured on the first one. A finished one is replaced at once.
    """

    def __init__(
        self,
        entry: ForwardEntry,
        *,
        width: Width,
        activation_bytes: int | None,
        seed: int | None,
        devices: tuple[str, ...],
        module_state: ModuleState,
        activation_offload: ActivationOffload | None,
        coalescing: Coalescing,
        kv: KvStore | None,
        lockstep: Callable[[], Lockstep | Unison] | None = None,
    ) -> None:
        if isinstance(width, int) and width < 1:
            raise PenstockError(f"a sweep of width {width} runs nothing: at least 1")
        self._entry = entry
        self._seed = seed
        self._devices = devices
        self._module_state = module_state
        self.activation_offload = activation_offload
        """Moves the activations of suspended micro-batches to host memory; None if they
        stay on the device."""
        self._coalescing = coalescing
        self._kv = kv
        self._lockstep = lockstep
        self._admission = Admission(
            width=width,
            activation_bytes=activation_bytes,
            num_sites=len(entry.open_sites.sites),
        )
        self._progress = SweepProgress()
        self._loop: SweepLoop | None = None
        self._is_closed = False

    def map(
        self,
        fn: Callable[[Batch], Result],
        batches: Iterable[Batch],
        *,
        return_exceptions: bool = False,
    ) -> list[Any]:
        """Returns `fn(batch)` for every batch, in order. `fn` may call the model any
        number of times, and may call `generate`. It must hold no lock while it does:
        the next micro-batch, on the same thread, would wait for that lock for ever.

        All batches are run even if some fail. Then the first error is raised; with
        `return_exceptions`, errors are put in the list in place of results.
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
    ) -> Outcomes[Result]:
        """Like `map`, but yields each outcome as soon as there is one. Batches are read
        from the iterable one by one, so it may be lazy and larger than memory.

        Each micro-batch has its own random state, seeded by the sweep's seed plus its
        index; without a seed, one is drawn from torch's generator.

        All outcomes are taken in one thread, the one that takes the first. Another
        thread gets PenstockError; the sweep can still be continued or closed then.
        """
        if self._is_closed:
            raise ClosedError("this sweep is closed: open another one")
        return Outcomes(self._outcomes(fn, batches))

    def _outcomes(
        self, fn: Callable[[Batch], Result], batches: Iterable[Batch]
    ) -> Generator[Outcome[Result], None, None]:
        self._check_open()
        loop = self._make_loop(fn, batches)
        try:
            self._entry.start_loop(loop)
            self._loop = loop
            loop.begin(self._seed)
            while not loop.is_done:
                self._check_open()
                with self._entry.computing():
                    loop.round()
                while loop.finished:
                    yield _outcome(loop)
            if loop.was_cut:
                self._check_open()
        finally:
            self._end(loop)

    @property
    def is_closed(self) -> bool:
        return self._is_closed

    def watch(self, arrived: Callable[[], None] | None) -> None:
        """Called by a running micro-batch: from now on calls `arrived()` in it whenever
        it may run a site, just before it does. `arrived` may raise, to leave the
        forward; the micro-batch may then call the model again."""
        assert self._loop is not None, "a micro-batch of this sweep calls it"
        self._loop.running.arrived = arrived

    def statistics(self) -> SweepStatistics:
        return SweepStatistics(
            num_started=self._progress.num_started,
            num_finished=self._progress.num_finished,
            **counters_of(self.counters()),
        )

    def counters(self) -> SweepCounters:
        """Those of its statistics that are counted for all sweeps together, too."""
        moved = self.activation_offload
        return SweepCounters(
            max_in_flight=self._progress.max_in_flight,
            held_bytes_per_micro_batch=self._admission.largest_held_bytes,
            **counters_of(self._coalescing.statistics()),
            **({} if moved is None else counters_of(moved.statistics())),
        )

    def close(self) -> None:
        """Stops the `run` under way, and allows no other. Called inside the run, or
        while its thread is running a micro-batch, it takes effect at the next outcome.
        Called by another thread, suspended micro-batches end when their own thread
        calls the model again or ends."""
        self._is_closed = True
        loop = self._loop
        if loop is not None and (loop.can_stop or not loop.is_mine):
            self._end(loop)
        if self._loop is None:  # an interrupt may have cut it off
            self._coalescing.stop()
        self._close_activation_offload()

    def _make_loop(self, fn: Callable[[Any], Any], batches: Iterable[Any]) -> SweepLoop:
        make: Callable[..., SweepLoop] = SweepLoop
        if self._lockstep is not None:  # several ranks share the model
            step = self._lockstep()
            if isinstance(step, Unison):
                make = partial(UnisonLoop, step)
            else:
                make = partial(RankedLoop, step)
        return make(
            SweepInput(fn, batches),
            self._entry,
            self._admission,
            self._progress,
            devices=self._devices,
            module_state=self._module_state,
            side_transfers=SideTransfers(self.activation_offload, self._kv),
            coalescing=self._coalescing,
        )

    def _check_open(self) -> None:
        if self._is_closed:
            raise ClosedError("this sweep was closed before it had ended")

    def _end(self, loop: SweepLoop) -> None:
        """Stops `loop`, or leaves it to its own thread, and gives its turn back. If an
        interrupt cuts this off, `close` does it again."""
        if self._entry.fork_guard.is_forked:  # the loop is the parent process's
            Endings.here().left.append(loop)
            return
        if not loop.is_mine:
            if loop.leave():
                self._loop = None
            return
        try:
            loop.stop()
        finally:
            self._entry.end_loop(loop)
            if self._loop is loop:
                self._loop = None
            if self._is_closed:
                self._close_activation_offload()

    def _close_activation_offload(self) -> None:
        """Closes the activation offload, unless a run may still need it."""
        if self._loop is None and self.activation_offload is not None:
            self.activation_offload.close()


def _outcome(loop: SweepLoop) -> Outcome[Any]:
    me = loop.finished.popleft()
    error = me.error if isinstance(me.error, Exception) else None
    return Outcome(me.index, me.value, error)

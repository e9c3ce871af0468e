"""Many micro-batches through each unit while it is there: the model's own code, run in
layer-major order by cooperative switching.

Each micro-batch runs the caller's function in a greenlet; `hub` says how they take
turns.
"""

import threading
from collections.abc import Callable, Generator, Iterable, Iterator
from dataclasses import dataclass
from inspect import GEN_RUNNING, getgeneratorstate
from typing import Any, Generic, TypeVar

from ...io.closing import Closing
from ...io.errors import ClosedError, PenstockError
from ..activations.evacuation import ActivationOffload
from ..kv.store import KvStore
from .admission import Admission, Width
from .coalescing import Coalescing, CoalescingStatistics
from .endings import Endings
from .entry import ForwardEntry
from .job import SweepInput, SweepProgress
from .loop import SweepLoop
from .module_state import ModuleState
from .moves import SideTransfers

Batch = TypeVar("Batch")
Result = TypeVar("Result")


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
    """Activations: the most that any one was seen to keep while it waited."""
    coalescing: CoalescingStatistics


class Outcomes(Closing, Iterator[Outcome[Result]], Generic[Result]):
    """What `run` yields, for the thread that takes the first."""

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
    """Runs micro-batches in lock-step over one model; closed by `with`.

    `width` bounds how many are in flight (a number, or what says whether the next one
    may start); `activation_bytes` bounds what they may keep alive between units,
    measured on the first one. A finished one is replaced at once.
    """

    def __init__(
        self,
        gate: ForwardEntry,
        *,
        width: Width,
        activation_bytes: int | None,
        seed: int | None,
        devices: tuple[str, ...],
        module_state: ModuleState,
        evacuation: ActivationOffload | None,
        coalescing: Coalescing,
        kv: KvStore | None,
    ) -> None:
        if isinstance(width, int) and width < 1:
            raise PenstockError(f"a sweep of width {width} runs nothing: at least 1")
        self._gate = gate
        self._seed = seed
        self._devices = devices
        self._module_state = module_state
        self.evacuation = evacuation
        """Moves what micro-batches hold while they are suspended; None: it stays."""
        self._coalescing = coalescing
        self._kv = kv
        self._admission = Admission(
            width=width,
            activation_bytes=activation_bytes,
            num_sites=len(gate.doors.sites),
        )
        self._progress = SweepProgress()
        self._hub: SweepLoop | None = None
        self._is_closed = False

    def map(
        self,
        fn: Callable[[Batch], Result],
        batches: Iterable[Batch],
        *,
        return_exceptions: bool = False,
    ) -> list[Any]:
        """`fn(batch)` for every batch, in order. `fn` may call the model as often as
        it likes, `generate` included. It must hold no lock while it does: the next
        micro-batch, on the same thread, would wait for that lock for ever.

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
    ) -> Outcomes[Result]:
        """Like `map`, but yields each outcome as it comes. Batches are taken from the
        iterable as places become free, so it may be lazy and longer than memory.

        Each micro-batch has its own random state, seeded by the sweep's seed plus its
        index; without a seed, by one number drawn from torch's generator.

        All outcomes are taken in one thread, the one that takes the first. In another
        one they raise PenstockError, and the sweep can be gone on with or closed.
        """
        if self._is_closed:
            raise ClosedError("this sweep is closed: open another one")
        return Outcomes(self._outcomes(fn, batches))

    def _outcomes(
        self, fn: Callable[[Batch], Result], batches: Iterable[Batch]
    ) -> Generator[Outcome[Result], None, None]:
        self._check_open()
        hub = self._make_hub(fn, batches)
        try:
            self._gate.start_sweep(hub)
            self._hub = hub
            hub.begin(self._seed)
            while not hub.is_done:
                self._check_open()
                with self._gate.computing():
                    hub.round()
                while hub.finished:
                    yield _outcome(hub)
            if hub.was_cut:
                self._check_open()
        finally:
            self._end(hub)

    @property
    def is_closed(self) -> bool:
        return self._is_closed

    def statistics(self) -> SweepStatistics:
        return SweepStatistics(
            self._progress.num_started,
            self._progress.num_finished,
            self._progress.max_in_flight,
            self._admission.largest_held_bytes,
            self._coalescing.statistics(),
        )

    def close(self) -> None:
        """Stops the `run` under way, if there is one; there is none afterwards. From
        inside of it, or while its thread is in the middle of it: at its next outcome.
        From another thread: what is suspended unwinds when its own thread comes to the
        model again, or ends."""
        self._is_closed = True
        hub = self._hub
        if hub is not None and (hub.can_stop or not hub.is_mine):
            self._end(hub)
        if self._hub is None:  # an interrupt may have cut it off
            self._coalescing.stop()
        self._close_evacuation()

    def _make_hub(self, fn: Callable[[Any], Any], batches: Iterable[Any]) -> SweepLoop:
        return SweepLoop(
            SweepInput(fn, batches),
            self._gate,
            self._admission,
            self._progress,
            devices=self._devices,
            module_state=self._module_state,
            moves=SideTransfers(self.evacuation, self._kv),
            coalescing=self._coalescing,
        )

    def _check_open(self) -> None:
        if self._is_closed:
            raise ClosedError("this sweep was closed before it had ended")

    def _end(self, hub: SweepLoop) -> None:
        """Stops `hub`, or leaves it to its own thread, and lets others at the model, if
        it ever had its turn. Cut off by an interrupt, `close` does it again."""
        if not self._gate.home.is_here:  # its parent has it: nothing here runs again
            Endings.here().left.append(hub)
            return
        if not hub.is_mine:
            if hub.leave():
                self._hub = None
            return
        try:
            hub.stop()
        finally:
            self._gate.end_sweep(hub)
            if self._hub is hub:
                self._hub = None
            if self._is_closed:
                self._close_evacuation()

    def _close_evacuation(self) -> None:
        """Once nobody runs who may have something in host memory."""
        if self._hub is None and self.evacuation is not None:
            self.evacuation.close()


def _outcome(hub: SweepLoop) -> Outcome[Any]:
    me = hub.finished.popleft()
    error = me.error if isinstance(me.error, Exception) else None
    return Outcome(me.index, me.value, error)

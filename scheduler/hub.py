"""The hub of one sweep: lets micro-batches run in turn, each for as long as the site it
is at is open.

At the door of a site whose units are not there a micro-batch switches to the hub, which
opens one site at a time, lets in everybody who waits at it, and goes on to the next.
Layer-major order emerges.
"""

import logging
import threading
from collections import deque
from collections.abc import Callable
from functools import partial
from typing import Any

import greenlet
import torch

from ..io.errors import PenstockError
from .admission import Admission
from .gate import Gate
from .job import Job, Progress
from .micro_batch import MicroBatch
from .module_state import ModuleState
from .moves import Moves
from .thread_state import ThreadState

_log = logging.getLogger("penstock")

# A micro-batch may catch the exit and call the model again; not for ever.
_MAX_EXITS = 100
# What could not be ended stays suspended: were it to die, it would run once more.
_LEFT_BEHIND: list[MicroBatch] = []


class Hub:
    """Runs the micro-batches of one job, in the thread that made it: `begin`, `round`
    until it `is_done`, `stop`. What ended is in `finished`."""

    def __init__(
        self,
        job: Job,
        gate: Gate,
        admission: Admission,
        progress: Progress,
        *,
        devices: tuple[str, ...],
        module_state: ModuleState,
        moves: Moves,
    ) -> None:
        self.finished: deque[MicroBatch] = deque()
        self._job = job
        self._gate = gate
        self._admission = admission
        self._progress = progress
        self._devices = devices
        self._module_state = module_state
        self._moves = moves
        self._hub_state = ThreadState(devices)
        self._thread = threading.get_ident()
        self._in_flight: dict[int, MicroBatch] = {}
        self._waiting: dict[int, deque[MicroBatch]] = {}
        self._running: MicroBatch | None = None
        self._is_in_round = False
        self._is_stopping = False
        self._seed = 0
        self.was_cut = False
        """Whether `stop` came before the end."""

    @property
    def is_done(self) -> bool:
        return not (self._job.has_more or self._in_flight or self.finished)

    @property
    def can_stop(self) -> bool:
        """Whether the caller may stop it: its own thread, between two rounds."""
        return self._thread == threading.get_ident() and not self._is_in_round

    @property
    def is_running(self) -> bool:
        """Whether a micro-batch (not the hub) has the thread."""
        return self._running is not None

    def is_running_here(self) -> bool:
        """Whether the caller is this hub's running micro-batch."""
        return self._running is not None and self._running.is_current

    def begin(self, seed: int | None) -> None:
        """Once it has the turn: micro-batch i samples with `seed` + i, or with one
        number that is drawn here."""
        if seed is None:
            seed = int(torch.randint(2**31, (), device="cpu").item())
        self._seed = seed
        self._module_state.begin()

    # What the gate calls, inside a micro-batch.

    def arrive(self, site: int) -> None:
        """The running micro-batch is at `site`: returns once it is inside."""
        me = self._running
        assert me is not None, "only a running micro-batch arrives"
        self._exit_if_stopping(me)
        previous, me.last_site = me.last_site, site
        me.num_arrivals += 1
        self._gate.order.observe(previous, site, is_repeat=site in me.visited)
        me.visited.add(site)
        if not self._gate.doors.is_open(site):
            self._waiting.setdefault(site, deque()).append(me)
            self._module_state.look(me.index, previous, site)
            me.records_gradients = torch.is_grad_enabled()
            me.wait()
            self._exit_if_stopping(me)
        else:
            self._gate.bind_for(site, records_gradients=torch.is_grad_enabled())
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
        while True:
            me.wait()

    # The hub itself.

    def round(self) -> None:
        """Serves one site to all who wait there; new ones start when there is room."""
        self._is_in_round = True
        try:
            self._admit()
            if self._waiting:
                self._serve(self._gate.next_of(self._whose_turn()))
        finally:
            self._is_in_round = False

    def stop(self) -> None:
        """Ends what still waits, under its own state, `finally` and all."""
        self.was_cut = self.was_cut or not self.is_done
        self._is_stopping = True
        self._waiting.clear()
        errors: list[BaseException] = []
        for me in list(self._in_flight.values()):
            try:
                self._hub_state.resume()
                self._end(me)
            except BaseException as error:  # the others must end all the same
                errors.append(error)
        self._hub_state.resume()  # which an interrupt may have cut off
        if errors:
            raise errors[0]

    def _serve(self, site: int) -> None:
        gate = self._gate
        records_gradients = self._waiting[site][0].records_gradients
        gate.visit(site, self._expected(), records_gradients=records_gradients)
        try:
            while site in self._waiting:
                was_settled = self._admission.is_settled
                me = self._take(site)
                gate.bind_for(site, records_gradients=me.records_gradients)
                self._run(me, me.resume)
                if self._admit() and not was_settled and self._admission.is_settled:
                    gate.rewind()  # the scout is ahead: the others catch up with it
        finally:
            gate.leave(site)

    def _whose_turn(self) -> set[int]:
        """The sites that come into question: those where somebody waits inside of
        another site, whose units stay in use meanwhile, else all."""
        inner = {
            site
            for site, queue in self._waiting.items()
            if any(me.inside for me in queue)
        }
        return inner or set(self._waiting)

    def _expected(self) -> set[int]:
        """The sites where somebody waits, or will begin."""
        first = self._gate.order.first
        if self._job.expects_more and first is not None:
            return {*self._waiting, first}
        return set(self._waiting)

    def _take(self, site: int) -> MicroBatch:
        queue = self._waiting[site]
        me = queue.popleft()
        if not queue:
            del self._waiting[site]
        return me

    def _admit(self) -> int:
        """Starts what there is room for; returns how many."""
        job, num = self._job, 0
        while job.has_more and self._admission.has_room(len(self._in_flight)):
            try:
                index, batch = job.take()
            except StopIteration:
                break
            self._start(index, batch)
            num += 1
        return num

    def _start(self, index: int, batch: Any) -> None:
        me = MicroBatch(
            index,
            partial(self._job.fn, batch),
            devices=self._devices,
            hub_state=self._hub_state,
            module_state=self._module_state,
        )
        self._in_flight[index] = me
        progress = self._progress
        progress.num_started += 1
        progress.max_in_flight = max(progress.max_in_flight, len(self._in_flight))
        self._run(me, partial(me.start, self._seed + index))

    def _run(self, me: MicroBatch, piece: Callable[[], None]) -> None:
        self._moves.begin_turn(me.index, self._following)
        self._running = me
        try:
            piece()
        finally:
            self._running = None
            self._moves.end_turn()
        self._check_modules()
        if not me.is_done:
            if self._admission.wants(me.index, me.num_arrivals):
                self._admission.note(
                    me.index, me.num_arrivals, self._moves.held_bytes(me)
                )
            self._move_out(me)
            return
        self._leave_all(me)
        self._progress.num_finished += 1
        self._admission.finish(me.index, failed=me.error is not None)
        if me.error is None:
            self._gate.order.observe_end(me.last_site)
        elif not isinstance(me.error, Exception):
            raise me.error  # an interrupt is the caller's, not the micro-batch's
        self.finished.append(me)

    def _following(self) -> int | None:
        """Whose turn it is, as far as is known, after that of who runs."""
        if not self._waiting:
            return None
        site = self._gate.position
        if site not in self._waiting:
            site = self._gate.next_of(self._whose_turn())
        return self._waiting[site][0].index

    def _move_out(self, me: MicroBatch) -> None:
        """Who waits leaves the device, unless those two would soon take turns there."""
        if self._job.has_more or len(self._in_flight) > 2:
            self._moves.move_out(me)

    def _check_modules(self) -> None:
        if self._module_state.conflict is not None and len(self._in_flight) > 1:
            raise PenstockError(
                f"the model writes to {self._module_state.conflict} in place, where "
                "micro-batches would read what others left: sweep with width=1"
            )

    def _end(self, me: MicroBatch) -> None:
        self._running = me
        try:
            self._moves.bring_back(me.index)  # its `finally` may look at it
            me.exit()
        finally:
            self._running = None
            if me.is_alive:
                _LEFT_BEHIND.append(me)
            self._leave_all(me)
        if me.error is not None and not isinstance(me.error, Exception):
            raise me.error

    def _leave_all(self, me: MicroBatch) -> None:
        """A failed forward leaves without its hook; nothing stays open behind it."""
        self._in_flight.pop(me.index, None)
        self._moves.leave(me)
        while me.inside:
            self._gate.doors.leave(me.inside.pop())

"""The hub of one sweep: micro-batches run in turn, while the site they are at is open.

At the door of a site whose units are not there a micro-batch switches to the hub, which
opens one site at a time, lets in all who wait at it, and goes on: layer-major order.
"""

import threading
import time
from collections import deque
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from .admission import Admission
from .coalescing import Coalescing
from .gate import Gate
from .job import Job, Progress
from .micro_batch import MicroBatch
from .module_state import ModuleState
from .moves import Moves
from .thread_state import ThreadState
from .waiting import Waiting

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
        coalescing: Coalescing,
    ) -> None:
        self.finished: deque[MicroBatch] = deque()
        self._job = job
        self._gate = gate
        self._admission = admission
        self._progress = progress
        self._devices = devices
        self._module_state = module_state
        self._moves = moves
        self._coalescing = coalescing
        self._hub_state = ThreadState(devices)
        self._thread = threading.get_ident()
        self._in_flight: dict[int, MicroBatch] = {}
        self._waiting = Waiting()
        self._running: MicroBatch | None = None
        self._serving: int | None = None
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
    def running(self) -> MicroBatch:
        """The micro-batch that has the thread."""
        assert self._running is not None, "only a running micro-batch asks"
        return self._running

    @property
    def others_come(self) -> bool:
        """Whether more are to run at the site that is being served, or may start."""
        may_come = self._waiting.at(self._serving) or self._may_start
        return self._serving is not None and may_come

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
        self._coalescing.start(self)
        self._module_state.begin()

    # What the gate calls, inside a micro-batch.

    def arrive(self, site: int) -> None:
        """The running micro-batch is at `site`: returns once it is inside."""
        me = self.running
        self._exit_if_stopping(me)
        previous, me.last_site = me.last_site, site
        me.num_arrivals += 1
        self._gate.order.observe(previous, site, is_repeat=site in me.visited)
        me.visited.add(site)
        me.records_gradients = torch.is_grad_enabled()
        if not self._gate.doors.is_open(site):
            self._waiting.add(site, me)
            self._module_state.look(me.index, previous, site)
            me.wait()
            self._exit_if_stopping(me)
        else:
            self._gate.bind_for(site, records_gradients=me.records_gradients)
        self._gate.doors.enter(site)
        me.inside.append(site)

    def depart(self, site: int) -> None:
        """The running micro-batch has run `site`."""
        me = self.running
        if me.inside and me.inside[-1] == site:
            me.inside.pop()
            self._gate.doors.leave(site)

    def park(self, place: int) -> None:
        """The running micro-batch waits for its turn at `place` inside of its site."""
        me = self.running
        self._exit_if_stopping(me)
        # Others come to where it has been, and may overwrite what it left.
        self._module_state.look(me.index, me.inside[-1], -1 - place)
        me.park()
        self._exit_if_stopping(me)

    def _exit_if_stopping(self, me: MicroBatch) -> None:
        if self._is_stopping:
            me.exit_here()

    # The hub itself.

    def round(self) -> None:
        """Serves one site to all who wait there; new ones start when there is room."""
        self._is_in_round = True
        try:
            self._admit()
            if self._waiting:
                self._serve(self._gate.next_of(self._waiting.candidates()))
        finally:
            self._is_in_round = False

    def stop(self) -> None:
        """Ends what still waits, under its own state, `finally` and all."""
        self.was_cut = self.was_cut or not self.is_done
        self._is_stopping = True
        self._waiting.clear()
        self._coalescing.clear(self)
        errors: list[BaseException] = []
        for me in list(self._in_flight.values()):
            try:
                self._hub_state.resume()
                self._end(me)
            except BaseException as error:  # the others must end all the same
                errors.append(error)
        self._coalescing.stop(self)
        self._hub_state.resume()  # which an interrupt may have cut off
        if errors:
            raise errors[0]

    def _serve(self, site: int) -> None:
        gate = self._gate
        records_gradients = self._waiting.first(site).records_gradients
        gate.visit(site, self._expected(), records_gradients=records_gradients)
        self._serving = site
        try:
            while (me := self._take(site)) is not None:
                was_settled = self._admission.is_settled
                at = me.inside[-1] if me.is_parked else site
                gate.bind_for(at, records_gradients=me.records_gradients)
                self._run(me, me.resume)
                started = not me.is_parked and self._admit()
                if started and not was_settled and self._admission.is_settled:
                    gate.rewind()  # the scout is ahead: the others catch up with it
        finally:
            self._serving = None
            gate.leave(site)

    def _take(self, site: int) -> MicroBatch | None:
        """Who is to run while `site` is served; None once all have left it."""
        others_come = self._waiting.at(site)
        parked = self._coalescing.next(others_come=others_come)
        return self._waiting.take(site) if parked is None and others_come else parked

    def _expected(self) -> set[int]:
        """The sites where somebody waits, or will begin."""
        sites, first = self._waiting.sites(), self._gate.order.first
        if self._job.expects_more and first is not None:
            sites.add(first)
        return sites

    @property
    def _may_start(self) -> bool:
        return self._job.has_more and self._admission.has_room(len(self._in_flight))

    def _admit(self) -> int:
        """Starts what there is room for, up to one that ends at once: it is handed on
        first. Returns how many."""
        num, index = 0, -1
        while self._may_start and (not num or index in self._in_flight):
            self._hub_state.resume()  # who takes is the caller's code
            try:
                index, batch = self._job.take()
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
        self._progress.start(len(self._in_flight))
        self._run(me, partial(me.start, self._seed + index))

    def _run(self, me: MicroBatch, piece: Callable[[], None]) -> None:
        self._moves.begin_turn(me.index, self._upcoming)
        was_parked, start = me.is_parked, time.perf_counter()
        self._running = me
        try:
            piece()
        finally:
            self._running = None
            self._moves.end_turn()
        if len(self._in_flight) > 1:
            self._module_state.check()
        if me.is_parked:
            return  # not for long: what it holds stays where it is
        if not was_parked:
            self._gate.ran(me.index, start)
        if not me.is_done:
            if self._admission.wants(me.index, me.num_arrivals):
                held_bytes = self._moves.held_bytes(me)
                self._admission.note(me.index, me.num_arrivals, held_bytes)
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

    def _upcoming(self) -> list[int]:
        """Whose turn it is, as far as is known, around that of who runs: those that
        wait at the site that is served and at the next one, those inside of a site."""
        found = list(self._waiting.all_at(self._gate.position))
        if elsewhere := self._waiting.candidates() - {self._gate.position}:
            found += self._waiting.all_at(self._gate.next_of(elsewhere))
        found += (me for me in self._in_flight.values() if me.inside)
        return [me.index for me in found]

    def _move_out(self, me: MicroBatch) -> None:
        """Who waits leaves the device, unless those two would soon take turns there."""
        if self._job.has_more or len(self._in_flight) > 2:
            self._moves.move_out(me)

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

"""The hub of one sweep: micro-batches run in turn, while the site they are at is open.

At the door of a site whose units are not there a micro-batch switches to the hub, which
opens one site at a time, lets in all who wait at it, and goes on: layer-major order.
"""

import contextlib
import time
from collections import deque
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from .admission import Admission
from .coalescing import Coalescing
from .entry import ForwardEntry
from .in_flight import MicroBatchesInFlight
from .job import SweepInput, SweepProgress
from .micro_batch import MicroBatch
from .module_state import ModuleState
from .moves import SideTransfers
from .owner import Owner
from .thread_state import ThreadState
from .waiting import Waiting


class SweepLoop:
    """Runs the micro-batches of one job, in the thread that made it: `begin`, `round`
    until it `is_done`, `stop`. What ended is in `finished`. Another thread can only
    `leave` it, for its own one to stop what is suspended."""

    def __init__(
        self,
        job: SweepInput,
        gate: ForwardEntry,
        admission: Admission,
        progress: SweepProgress,
        *,
        devices: tuple[str, ...],
        module_state: ModuleState,
        moves: SideTransfers,
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
        self._owner = Owner(self)
        self._in_flight = MicroBatchesInFlight(gate.doors, moves, self._hub_state)
        self._waiting = Waiting()
        self._serving: int | None = None
        self._is_stopping = False
        self._seed = 0
        self.was_cut = False
        """Whether `stop` came before the end."""
        self.is_unwanted = False
        """Whether another thread wants it to end, and its own has not seen that yet."""

    @property
    def is_done(self) -> bool:
        return not (self._job.has_more or self._in_flight or self.finished)

    @property
    def is_mine(self) -> bool:
        """Whether the caller's thread is the one that it runs in."""
        return self._owner.is_here

    @property
    def can_stop(self) -> bool:
        """Whether the caller may stop it: its own thread, between two rounds."""
        return self._owner.is_idle_here

    @property
    def running(self) -> MicroBatch:
        """The micro-batch that has the thread."""
        assert self._in_flight.running is not None, "only a running one asks"
        return self._in_flight.running

    @property
    def others_come(self) -> bool:
        """Whether more are to run at the site that is being served, or may start."""
        may_come = self._waiting.at(self._serving) or self._may_start
        return self._serving is not None and may_come

    @property
    def is_running(self) -> bool:
        """Whether a micro-batch (not the hub) has the thread."""
        return self._in_flight.running is not None

    def is_running_here(self) -> bool:
        """Whether the caller is this hub's running micro-batch."""
        return self.is_running and self.running.is_current

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
        with self._owner.at_work():
            self._admit()
            if self._waiting:
                self._serve(self._gate.next_of(self._waiting.candidates()))

    def stop(self) -> None:
        """Ends what still waits, under its own state, `finally` and all."""
        with self._owner.at_work(ends=True):
            self._begin_to_stop()
            errors = self._in_flight.end_all()
            self._coalescing.stop(self)
            self._hub_state.resume()  # which an interrupt may have cut off
        self._owner.has_ended()
        if errors:
            raise errors[0]

    def leave(self) -> bool:
        """Ends it as far as another thread than its own can: from now on it has nothing
        of the model, and nothing of it is started. What is suspended is kept for its
        thread to stop. False while that thread is in the middle of something."""
        self.is_unwanted = True
        if not self._owner.leave(may_leave=partial(self._gate.take_over, self)):
            return False
        try:
            self._begin_to_stop()
            self._coalescing.stop(self)
            self._module_state.let_go()
            self._in_flight.let_go()
            self._owner.end_later()
        finally:
            self._gate.end_taken_over(self)
        return True

    def end_with_thread(self) -> None:
        """Its thread is about to end, or comes by after it was left."""
        with contextlib.suppress(BaseException):
            self.stop()
        self._gate.end_sweep(self)

    def _begin_to_stop(self) -> None:
        self.was_cut = self.was_cut or not self.is_done
        self._is_stopping = True
        self._waiting.clear()
        self._coalescing.clear(self)

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
        self._in_flight.add(me)
        self._progress.start(len(self._in_flight))
        self._run(me, partial(me.start, self._seed + index))

    def _run(self, me: MicroBatch, piece: Callable[[], None]) -> None:
        self._moves.begin_turn(me.index, self._upcoming)
        was_parked, start = me.is_parked, time.perf_counter()
        try:
            self._in_flight.run(me, piece)
        finally:
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
            # Unless those two would soon take turns on the device.
            if self._job.has_more or len(self._in_flight) > 2:
                self._moves.move_out(me)
            return
        self._in_flight.leave(me)
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
        found += (me for me in self._in_flight if me.inside)
        return [me.index for me in found]

"""The loop of one sweep: micro-batches take turns, site by site (layer-major order).

A micro-batch that reaches a site that is not open switches to the loop's greenlet. The
loop opens one site at a time and resumes every micro-batch that waits for it.
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
from .micro_batch import MicroBatch
from .module_state import ModuleState
from .owner import Owner
from .side_transfers import SideTransfers
from .sweep_input import SweepInput, SweepProgress
from .thread_state import ThreadState
from .waiting import Waiting


class SweepLoop:
    """Runs the micro-batches of one input in the thread that creates it: `begin`, then
    `round` until it `is_done`, then `stop`. Those that ended are in `finished`. Another
    thread can only `leave` the loop; its own thread stops it later."""

    def __init__(
        self,
        sweep_input: SweepInput,
        entry: ForwardEntry,
        admission: Admission,
        progress: SweepProgress,
        *,
        devices: tuple[str, ...],
        module_state: ModuleState,
        side_transfers: SideTransfers,
        coalescing: Coalescing,
    ) -> None:
        self.finished: deque[MicroBatch] = deque()
        self._input = sweep_input
        self._entry = entry
        self._admission = admission
        self._progress = progress
        self._devices = devices
        self._module_state = module_state
        self._side_transfers = side_transfers
        self._coalescing = coalescing
        self._loop_state = ThreadState(devices)
        self._owner = Owner(self)
        state = self._loop_state
        self._in_flight = MicroBatchesInFlight(entry.open_sites, side_transfers, state)
        self._waiting = Waiting()
        self._serving: int | None = None
        self._is_stopping = False
        self._seed = 0
        self.was_cut = False
        """Whether `stop` was called before all batches had been run."""
        self.is_unwanted = False
        """Whether another thread has asked for its end."""

    @property
    def is_done(self) -> bool:
        return not (self._input.has_more or self._in_flight or self.finished)

    @property
    def is_mine(self) -> bool:
        """Whether the caller runs in this loop's thread."""
        return self._owner.is_here

    @property
    def can_stop(self) -> bool:
        """Whether the caller may stop it: in its own thread, between two rounds."""
        return self._owner.is_idle_here

    @property
    def running(self) -> MicroBatch:
        """The micro-batch that is running."""
        assert self._in_flight.running is not None, "only a running one asks"
        return self._in_flight.running

    @property
    def others_come(self) -> bool:
        """Whether another micro-batch waits for the site that is open, or may start."""
        may_come = self._waiting.at(self._serving) or self._may_start
        return self._serving is not None and may_come

    @property
    def is_running(self) -> bool:
        """Whether a micro-batch is running, and not the loop."""
        return self._in_flight.running is not None

    def is_running_here(self) -> bool:
        """Whether the caller is a micro-batch of this loop."""
        return self.is_running and self.running.is_current

    def begin(self, seed: int | None) -> None:
        """Called once it has the turn. The random seed of micro-batch i is `seed` + i;
        without a `seed`, one is drawn here."""
        if seed is None:
            seed = int(torch.randint(2**31, (), device="cpu").item())
        self._seed = seed
        self._coalescing.start(self)
        self._module_state.begin()

    # Called by ForwardEntry and Coalescing, inside a micro-batch.

    def arrive(self, site: int) -> None:
        """The running micro-batch has reached `site`. Returns once it may run it."""
        me = self.running
        self._exit_if_stopping(me)
        previous, me.last_site = me.last_site, site
        me.num_arrivals += 1
        self._entry.order.observe(previous, site, is_repeat=site in me.visited)
        me.visited.add(site)
        me.records_gradients = torch.is_grad_enabled()
        if not self._entry.open_sites.is_open(site):
            self._waiting.add(site, me)
            self._module_state.look(me.index, previous, site)
            me.wait()
            self._exit_if_stopping(me)
        else:
            self._entry.bind_for(site, records_gradients=me.records_gradients)
        me.may_run(site, previous)
        self._entry.open_sites.enter(site)
        me.inside.append(site)

    def depart(self, site: int) -> None:
        """The running micro-batch has run `site`."""
        me = self.running
        if me.inside and me.inside[-1] == site:
            me.inside.pop()
            self._entry.open_sites.leave(site)

    def park(self, place: int) -> None:
        """Suspends the running micro-batch at module `place` inside its site."""
        me = self.running
        self._exit_if_stopping(me)
        # Others run the modules that it has run, and may overwrite their attributes.
        self._module_state.look(me.index, me.inside[-1], -1 - place)
        me.park()
        self._exit_if_stopping(me)

    def _exit_if_stopping(self, me: MicroBatch) -> None:
        if self._is_stopping:
            me.exit_here()

    def round(self) -> None:
        """Opens one site for all that wait for it; starts new ones if there is room."""
        with self._owner.at_work():
            self._admit()
            if self._waiting:
                self._serve(self._entry.next_of(self._waiting.candidates()))

    def stop(self) -> None:
        """Ends all suspended micro-batches; each runs its `finally` blocks."""
        with self._owner.at_work(ends=True):
            self._begin_to_stop()
            errors = self._in_flight.end_all()
            self._coalescing.stop(self)
            self._loop_state.resume()  # again: an interrupt may have cut it off
            self._input.let_go()
        self._owner.has_ended()
        if errors:
            raise errors[0]

    def leave(self) -> bool:
        """Called by another thread: detaches the loop from the model and starts nothing
        more. Its suspended micro-batches are kept until its own thread stops them.
        Returns False, and changes nothing, while that thread runs a piece of it."""
        self.is_unwanted = True
        if not self._owner.leave(may_leave=partial(self._entry.take_over, self)):
            return False
        try:
            self._begin_to_stop()
            self._coalescing.stop(self)
            self._module_state.let_go()
            self._in_flight.let_go()
            self._owner.end_later()
        finally:
            self._entry.end_taken_over(self)
        return True

    def end_with_thread(self) -> None:
        """Stops it: its thread is about to end, or another thread has left it."""
        with contextlib.suppress(BaseException):
            self.stop()
        self._entry.end_loop(self)

    def _begin_to_stop(self) -> None:
        self.was_cut = self.was_cut or not self.is_done
        self._is_stopping = True
        self._waiting.clear()
        self._coalescing.clear(self)

    def _serve(self, site: int) -> None:
        entry = self._entry
        records_gradients = self._waiting.first(site).records_gradients
        entry.visit(site, self._expected(), records_gradients=records_gradients)
        self._serving = site
        try:
            while (me := self._take(site)) is not None:
                was_settled = self._admission.is_settled
                at = me.inside[-1] if me.is_parked else site
                entry.bind_for(at, records_gradients=me.records_gradients)
                self._run(me, me.resume)
                started = not me.is_parked and self._admit()
                if started and not was_settled and self._admission.is_settled:
                    entry.rewind()  # the scout (see admission) ran ahead: catch up
        finally:
            self._serving = None
            entry.leave(site)

    def _take(self, site: int) -> MicroBatch | None:
        """The micro-batch to run next while `site` is open; None if there is none."""
        others_come = self._waiting.at(site)
        parked = self._coalescing.next(others_come=others_come)
        return self._waiting.take(site) if parked is None and others_come else parked

    def _expected(self) -> set[int]:
        """The sites for which micro-batches wait, or at which new ones will start."""
        sites, first = self._waiting.sites(), self._entry.order.first
        if self._input.expects_more and first is not None:
            sites.add(first)
        return sites

    @property
    def _may_start(self) -> bool:
        return self._input.has_more and self._admission.has_room(len(self._in_flight))

    def _admit(self) -> int:
        """Starts micro-batches while there is room. Stops after one that ends at once,
        so that its outcome is yielded first. Returns how many were started."""
        num, index = 0, -1
        while self._may_start and (not num or index in self._in_flight):
            self._loop_state.resume()  # `take` runs the caller's iterator
            try:
                index, batch = self._input.take()
            except StopIteration:
                break
            self._start(index, batch)
            num += 1
        return num

    def _start(self, index: int, batch: Any) -> None:
        me = MicroBatch(
            index,
            partial(self._input.fn, batch),
            devices=self._devices,
            loop_state=self._loop_state,
            module_state=self._module_state,
        )
        self._in_flight.add(me)
        self._progress.start(len(self._in_flight))
        self._run(me, partial(me.start, self._seed + index))

    def _run(self, me: MicroBatch, piece: Callable[[], None]) -> None:
        self._side_transfers.begin_turn(me.index, self._upcoming)
        was_parked, start = me.is_parked, time.perf_counter()
        try:
            self._in_flight.run(me, piece)
        finally:
            self._side_transfers.end_turn()
        if len(self._in_flight) > 1:
            self._module_state.check()
        if me.is_parked:
            return  # it resumes soon: its activations stay where they are
        if not was_parked:
            self._entry.ran(me.index, start)
        if not me.is_done:
            if self._admission.wants(me.index, me.num_arrivals):
                held_bytes = self._side_transfers.held_bytes(me)
                self._admission.note(me.index, me.num_arrivals, held_bytes)
            # With two in flight, each would soon be needed again.
            if self._input.has_more or len(self._in_flight) > 2:
                self._side_transfers.move_out(me)
            return
        self._in_flight.leave(me)
        self._progress.num_finished += 1
        self._admission.finish(me.index, failed=me.error is not None)
        if me.error is None:
            self._entry.order.observe_end(me.last_site)
        elif not isinstance(me.error, Exception):
            raise me.error  # an interrupt is raised to the caller of the sweep
        self.finished.append(me)

    def _upcoming(self) -> list[int]:
        """The micro-batches that will probably run next, in order: those that wait for
        the open site, those that wait for the next site, those parked inside a site."""
        upcoming = list(self._waiting.all_at(self._entry.position))
        if elsewhere := self._waiting.candidates() - {self._entry.position}:
            upcoming += self._waiting.all_at(self._entry.next_of(elsewhere))
        upcoming += (me for me in self._in_flight if me.inside)
        return [me.index for me in upcoming]

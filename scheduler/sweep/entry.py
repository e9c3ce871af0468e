"""What a site's hooks call: suspends a micro-batch, lets a plain call through."""

import contextlib
import threading
import time
from collections.abc import Iterator
from typing import Any, Protocol

import torch

from ...io.errors import PenstockError
from ...io.fork_guard import ForkGuard
from ...io.timeline import COMPUTE, MICRO_BATCHES, Record, unrecorded
from ..order import Order
from ..slots.open_sites import OpenSites
from .turn import RunningLoop, Turn, is_waited_for


class EnteringLoop(RunningLoop, Protocol):
    """A sweep loop, as ForwardEntry sees it; `SweepLoop` describes the members."""

    @property
    def is_mine(self) -> bool: ...

    @property
    def can_stop(self) -> bool: ...

    @property
    def is_unwanted(self) -> bool: ...

    def is_running_here(self) -> bool: ...

    def arrive(self, site: int) -> None: ...

    def depart(self, site: int) -> None: ...

    def end_with_thread(self) -> None: ...


class ForwardEntry:
    """Lets a forward into each site, once the site's weights are loaded.

    One thread at a time runs the model: the one that sweeps, or the one whose plain
    call is inside a site. A call from another thread waits for its turn. A call in a
    forked child of the process that made `fork_guard` raises PenstockError.
    """

    def __init__(
        self,
        open_sites: OpenSites,
        order: Order,
        *,
        lookahead: int,
        record: Record = unrecorded,
        fork_guard: ForkGuard | None = None,
        turn: Turn | None = None,
    ) -> None:
        self.record = record
        self.fork_guard = fork_guard or ForkGuard()
        self._opened_at = 0.0
        self.open_sites = open_sites
        self.order = order
        self.num_passes = 0
        self.compute_seconds = 0.0
        self.rank_seconds = 0.0
        """Time that forwards waited for other ranks."""
        self.first_visit_at: float | None = None
        self._lookahead = lookahead
        self._records_gradients = False
        self._turn = turn or Turn()
        self._loop: EnteringLoop | None = None
        self._left: list[EnteringLoop] = []
        """Sweeps that another thread has closed; their own threads must stop them."""
        self._loop_thread = 0
        self.position: int | None = None
        """The site that was opened last."""
        self._plain: list[tuple[int, int]] = []
        """(thread, site) of the plain calls under way, outermost first."""
        self._plain_started = 0.0

    @property
    def fraction(self) -> float:
        """The part of the current pass over the sites that is done, 0 to 1."""
        return self.order.fraction(self.position)

    def before(self, site: int) -> None:
        """Waits until `site` may run. Called by its forward pre-hook."""
        self.fork_guard.check()
        if (loop := self.loop_here()) is not None:
            loop.arrive(site)
        else:
            self._begin_plain(site)

    def after(self, site: int) -> None:
        """`site` has run or failed. Called by its forward hook."""
        if (loop := self.loop_here()) is not None:
            loop.depart(site)
        elif self._plain and self._plain[-1] == (threading.get_ident(), site):
            self._end_plain()

    def visit(self, site: int, waiting: set[int], *, records_gradients: bool) -> None:
        """Opens `site` until `leave`, and prefetches the sites that follow. How weights
        are bound depends on whether their readers record gradients."""
        self._records_gradients = records_gradients
        with torch.set_grad_enabled(records_gradients):
            self.open_sites.enter(site)
        try:
            if self.first_visit_at is None:
                self.first_visit_at = time.perf_counter()
            if not self.order.is_ahead(self.position, site):
                self.num_passes += 1
            self.position = site
            self.open_sites.prefetch_from(site, self.order, waiting, self._lookahead)
        except BaseException:
            self.open_sites.leave(site)
            raise
        self._opened_at = time.perf_counter()

    def bind_for(self, site: int, *, records_gradients: bool) -> None:
        """Binds the open `site` again if the next reader's grad mode differs."""
        if records_gradients != self._records_gradients:
            self._records_gradients = records_gradients
            with torch.set_grad_enabled(records_gradients):
                self.open_sites.bind_again(site)

    def leave(self, site: int) -> None:
        """Ends a `visit`."""
        name, now = self.open_sites.sites[site].name, time.perf_counter()
        self.record(COMPUTE, name, self._opened_at, now)
        with torch.set_grad_enabled(self._records_gradients):
            self.open_sites.leave(site)

    def aside(self) -> contextlib.AbstractContextManager[None]:
        """Closes the site that a sweep serves meanwhile, if nobody is inside of it."""
        self._records_gradients = torch.is_grad_enabled()
        swept = None if self.loop_here() is None else self.position
        return self.open_sites.aside(swept)

    def ran(self, index: int, start: float) -> None:
        """Records that micro-batch `index` has run since `start` (perf_counter)."""
        self.record(MICRO_BATCHES, f"{index}", start, time.perf_counter())

    def next_of(self, waiting: set[int]) -> int:
        """The site among `waiting` to open next."""
        return self.order.nearest(self.position, waiting)

    @contextlib.contextmanager
    def turn(self) -> Iterator[None]:
        """Holds the turn: other threads cannot run the model meanwhile."""
        self.fork_guard.check()
        who = self._take_turn()
        try:
            yield
        finally:
            self._turn.give_back(who)

    @contextlib.contextmanager
    def idle(self, *, is_busy: bool) -> Iterator[None]:
        """Holds the turn while no forward runs. Raises PenstockError during a sweep, or
        if the caller `is_busy` with a forward."""
        if self._loop is None and not is_busy:
            with self.turn():
                if self._loop is None and not self._plain:
                    yield
                    return
        raise PenstockError(
            "weights cannot be changed while a sweep or a forward is under way: change "
            "them before it or after it"
        )

    @contextlib.contextmanager
    def computing(self) -> Iterator[None]:
        """Adds the time spent inside, less the waits, to the counter."""
        start, waited = time.perf_counter(), self._waited_seconds
        try:
            yield
        finally:
            # Added in one step: another thread may read the counter.
            waited = self._waited_seconds - waited
            self.compute_seconds += time.perf_counter() - start - waited

    @property
    def _waited_seconds(self) -> float:
        return self.open_sites.wait_seconds + self.rank_seconds

    def rewind(self) -> None:
        """Makes `next_of` start again from the first site."""
        self.position = None

    def start_loop(self, loop: EnteringLoop) -> None:
        """Waits for the turn and gives it to `loop`, until `end_loop`."""
        self.fork_guard.check()
        who = self._take_turn()
        try:
            if self._loop is not None:
                raise PenstockError(
                    "a sweep over this model is under way: finish it before the next"
                )
            self._close_all()
            self._loop_thread = threading.get_ident()
            self._loop = loop
            self._turn.hand_over(who, loop)
        except BaseException:
            if self._loop is not loop:
                self._turn.give_back(who)
            raise

    def end_loop(self, loop: EnteringLoop) -> None:
        """Gives the turn back if `loop` has it."""
        if loop in self._left:
            self._left.remove(loop)
        if self._loop is loop:
            try:
                self._close_all()
            finally:
                self._loop = None
                self._turn.give_up(loop)

    def take_over(self, loop: EnteringLoop) -> bool:
        """Gives the turn of `loop`, which runs in another thread, to the caller's
        thread. Returns False while the other thread is in a plain call."""
        return self._turn.hand_over(loop, threading.get_ident(), is_once=True)

    def end_taken_over(self, loop: EnteringLoop) -> None:
        """Gives back the turn that `take_over` got."""
        self._left.append(loop)
        try:
            self._close_all()
        finally:
            self._loop = None
            self._turn.give_up(threading.get_ident())

    def abandon_plain(self) -> None:
        """Closes the sites that an interrupted plain call left open: no forward hook
        runs after an interrupt. Called when the model's own forward begins."""
        self.fork_guard.check()
        self._recover()
        who = threading.get_ident()
        if self._loop is None and self._turn.take(who):
            try:  # without the turn, another thread is inside those sites
                self._close_all()
            finally:
                self._turn.give_up(who)

    def loop_here(self) -> EnteringLoop | None:
        """The sweep of which the caller is the running micro-batch, if any."""
        loops = (loop for loop in (self._loop, *self._left) if loop is not None)
        return next((loop for loop in loops if loop.is_running_here()), None)

    def _close_all(self) -> None:
        """Closes all sites. The caller has the turn and is in none of them."""
        while self._plain:
            self._end_plain()
        self.open_sites.shut()

    def _begin_plain(self, site: int) -> None:
        who = self._take_turn()
        try:
            self.order.observe(self.position, site, is_repeat=True)
            self.visit(site, set(), records_gradients=torch.is_grad_enabled())
            self._plain.append((threading.get_ident(), site))
        except BaseException:
            self._turn.give_back(who)
            raise
        self._plain_started = time.perf_counter()

    def _end_plain(self) -> None:
        start, self._plain_started = self._plain_started, time.perf_counter()
        self.compute_seconds += self._plain_started - start
        try:
            site = self._plain.pop()[1]
            name = self.open_sites.sites[site].name
            self.record(COMPUTE, name, start, self._plain_started)
            self.open_sites.leave(site)
        finally:
            self._turn.give_back(self._who())
        loop = None if self._plain else self._loop
        if loop is not None and loop.is_unwanted and loop.can_stop:
            loop.end_with_thread()  # another thread asked for that meanwhile

    def _recover(self) -> None:
        """Gives back the turn of a sweep of this thread whose end was interrupted."""
        owner = self._turn.owner
        if owner is not self._loop and getattr(owner, "is_mine", False):
            self._turn.give_up(owner)

    def _who(self) -> Any:
        """The owner in whose name the caller takes the turn: the sweep that runs in its
        thread, or else the number of its thread."""
        loop = self._loop
        return loop if loop is not None and loop.is_mine else threading.get_ident()

    def _take_turn(self) -> Any:
        """Waits for the turn. Returns its owner, which has to give it back."""
        for left in [left for left in self._left if left.can_stop]:
            left.end_with_thread()
        self._recover()
        return self._turn.wait(
            self._who, lambda: is_waited_for(self._loop_thread, self._loop)
        )

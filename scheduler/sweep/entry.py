"""What a module's hooks call: lets a plain call through, stops a swept micro-batch."""

import contextlib
import threading
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch

from ...io import handle
from ...io.errors import PenstockError
from ...io.home import Home
from ...io.timeline import COMPUTE, MICRO_BATCHES, Record, unrecorded
from ..activations.frames import wait_of
from ..order import Order
from ..slots.doors import Doors
from .turn import Turn

if TYPE_CHECKING:
    from .loop import SweepLoop

_POLL_SECONDS = 0.2
_STUCK_POLLS = 10


class ForwardEntry:
    """`before` and `after` every site, for sweeps and for plain calls.

    One thread at a time runs the model: the one that sweeps, or the one whose plain
    call is inside a site. A call from another thread waits its turn; one from another
    process than `home` raises PenstockError.
    """

    def __init__(
        self,
        doors: Doors,
        order: Order,
        *,
        lookahead: int,
        record: Record = unrecorded,
        home: Home | None = None,
    ) -> None:
        self._record = record
        self.home = home or Home()
        self._opened_at = 0.0
        self.doors = doors
        self.order = order
        self.num_passes = 0
        self.compute_seconds = 0.0
        self.first_visit_at: float | None = None
        self._lookahead = lookahead
        self._records_gradients = False
        self._turn = Turn()
        self._sweep: SweepLoop | None = None
        self._left: list[SweepLoop] = []
        """Sweeps that another thread has ended, to be stopped by their own."""
        self._sweeping_thread = 0
        self.position: int | None = None
        """The site that was visited last."""
        self._plain: list[tuple[int, int]] = []
        """(thread, site) of the plain calls under way, outermost first."""
        self._plain_started = 0.0

    @property
    def fraction(self) -> float:
        """How far through its sites the current pass is, 0 to 1."""
        return self.order.fraction(self.position)

    def before(self, site: int) -> None:
        """Returns when `site` may run; called by its forward pre-hook."""
        self.home.check()
        sweep = self._sweep_here()
        if sweep is not None:
            sweep.arrive(site)
        else:
            self._begin_plain(site)

    def after(self, site: int) -> None:
        """`site` has run, or has failed; called by its forward hook."""
        sweep = self._sweep_here()
        if sweep is not None:
            sweep.depart(site)
        elif self._plain and self._plain[-1] == (threading.get_ident(), site):
            self._end_plain()

    def visit(self, site: int, waiting: set[int], *, records_gradients: bool) -> None:
        """Opens `site` for as long as the caller stays inside, and looks ahead. Weights
        are bound according to whether those who use them record gradients."""
        self._records_gradients = records_gradients
        with torch.set_grad_enabled(records_gradients):
            self.doors.enter(site)
        try:
            if self.first_visit_at is None:
                self.first_visit_at = time.perf_counter()
            if not self.order.is_ahead(self.position, site):
                self.num_passes += 1
            self.position = site
            self.doors.expect(
                self.order.upcoming(site, waiting, self._lookahead, self.doors.stays)
            )
        except BaseException:
            self.doors.leave(site)
            raise
        self._opened_at = time.perf_counter()

    def bind_for(self, site: int, *, records_gradients: bool) -> None:
        """Another one comes to use the open `site`, which may differ in that."""
        if records_gradients != self._records_gradients:
            self._records_gradients = records_gradients
            with torch.set_grad_enabled(records_gradients):
                self.doors.bind_again(site)

    def leave(self, site: int) -> None:
        """The end of a `visit`."""
        self._record(
            COMPUTE, self.doors.sites[site].name, self._opened_at, time.perf_counter()
        )
        with torch.set_grad_enabled(self._records_gradients):
            self.doors.leave(site)

    def ran(self, index: int, start: float) -> None:
        """Micro-batch `index` has had the thread since `start`."""
        self._record(MICRO_BATCHES, f"{index}", start, time.perf_counter())

    def next_of(self, waiting: set[int]) -> int:
        """The site among `waiting` whose turn it is."""
        return self.order.nearest(self.position, waiting)

    @contextlib.contextmanager
    def turn(self) -> Iterator[None]:
        """Keeps other threads from running the model meanwhile."""
        self.home.check()
        who = self._take_turn()
        try:
            yield
        finally:
            self._turn.give_back(who)

    @contextlib.contextmanager
    def idle(self, *, is_busy: bool) -> Iterator[None]:
        """The turn, while nobody computes. Raises PenstockError during a sweep, or
        where the caller `is_busy` with a forward."""
        if self._sweep is None and not is_busy:
            with self.turn():
                if self._sweep is None and not self._plain:
                    yield
                    return
        raise PenstockError(
            "weights cannot be changed while a sweep or a forward is under way: change "
            "them before it or after it"
        )

    @contextlib.contextmanager
    def computing(self) -> Iterator[None]:
        """Counts the time spent inside, less what is spent waiting for weights."""
        start, waited = time.perf_counter(), self.doors.wait_seconds
        try:
            yield
        finally:
            # In one step: another thread may be looking.
            waited = self.doors.wait_seconds - waited
            self.compute_seconds += time.perf_counter() - start - waited

    def rewind(self) -> None:
        """Goes back to the earliest site that anybody waits at."""
        self.position = None

    def start_sweep(self, sweep: "SweepLoop") -> None:
        """Waits for the turn and keeps it until `end_sweep`."""
        self.home.check()
        who = self._take_turn()
        try:
            if self._sweep is not None:
                raise PenstockError(
                    "a sweep over this model is under way: finish it before the next "
                    "one"
                )
            self._close_all()
            self._sweeping_thread = threading.get_ident()
            self._sweep = sweep
            self._turn.hand_over(who, sweep)
        except BaseException:
            if self._sweep is not sweep:
                self._turn.give_back(who)
            raise

    def end_sweep(self, sweep: "SweepLoop") -> None:
        """Lets others have their turn, if it was this sweep's."""
        if sweep in self._left:
            self._left.remove(sweep)
        if self._sweep is sweep:
            try:
                self._close_all()
            finally:
                self._sweep = None
                self._turn.give_up(sweep)

    def take_over(self, sweep: "SweepLoop") -> bool:
        """The caller's thread ends `sweep`, which is not its own. False while that
        one's thread is in a plain call."""
        return self._turn.hand_over(sweep, threading.get_ident(), is_once=True)

    def end_taken_over(self, sweep: "SweepLoop") -> None:
        """Lets others have their turn after `take_over`."""
        self._left.append(sweep)
        try:
            self._close_all()
        finally:
            self._sweep = None
            self._turn.give_up(threading.get_ident())

    def abandon_plain(self) -> None:
        """Closes what an interrupted plain call left open (no hook runs after an
        interrupt): called where the model's own forward begins."""
        self.home.check()
        self._recover()
        who = threading.get_ident()
        if self._sweep is None and self._turn.take(who):
            try:  # else it is another thread's, and alive
                self._close_all()
            finally:
                self._turn.give_up(who)

    def _sweep_here(self) -> "SweepLoop | None":
        """The sweep whose running micro-batch is the caller, if it is in one."""
        sweep = self._sweep
        if sweep is not None and sweep.is_running_here():
            return sweep
        return next((left for left in self._left if left.is_running_here()), None)

    def _close_all(self) -> None:
        """Called by who has the turn, outside of all sites."""
        while self._plain:
            self._end_plain()
        self.doors.shut()

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
            name = self.doors.sites[site].name
            self._record(COMPUTE, name, start, self._plain_started)
            self.doors.leave(site)
        finally:
            self._turn.give_back(self._who())
        sweep = None if self._plain else self._sweep
        if sweep is not None and sweep.is_unwanted and sweep.can_stop:
            sweep.end_with_thread()  # which another thread could not do meanwhile

    def _recover(self) -> None:
        """An interrupt may have cut off the end of a sweep of this thread."""
        owner = self._turn.owner
        if owner is not self._sweep and getattr(owner, "is_mine", False):
            self._turn.give_up(owner)

    def _who(self) -> Any:
        """Whose turn it is when the caller has it: its thread's own sweep, or else its
        thread. A sweep that runs is not ended by another thread meanwhile."""
        sweep = self._sweep
        if sweep is not None and sweep.is_mine:
            return sweep
        return threading.get_ident()

    def _take_turn(self) -> Any:
        """Returns who has it now, and is to give it back."""
        for left in [left for left in self._left if left.can_stop]:
            left.end_with_thread()
        self._recover()
        who, polls = self._who(), 0
        while not self._turn.take(who, timeout_seconds=_POLL_SECONDS):
            polls = polls + 1 if self._is_waited_for() else 0
            if polls >= _STUCK_POLLS:
                raise PenstockError(
                    "the thread that sweeps waits for this thread, which waits for the "
                    "sweep: call the model from the micro-batch's own thread (a "
                    "streamer's thread cannot take part in a sweep)"
                )
            who = self._who()  # another thread may have ended this one's sweep
        return who

    def _is_waited_for(self) -> bool:
        """Whether the sweeping thread, or a micro-batch in it, may wait for the caller:
        not if it waits for weights, which come by themselves."""
        sweep = self._sweep
        waits = wait_of(self._sweeping_thread, not_in=handle.__file__)
        in_lock = waits == "lock" and sweep is not None and sweep.is_running
        return waits == "caller" or in_lock

"""The loops of a sweep whose model several ranks share."""

import sys
import time
from collections.abc import Callable
from typing import Any

from ...io.errors import PenstockError, RanksError
from ...io.timeline import RANKS
from ..ranks.lockstep import Lockstep
from ..ranks.stages import (
    Address,
    CallState,
    LapPosition,
    Waits,
    is_waited_for,
    servable,
)
from ..ranks.unison import Unison
from .loop import SweepLoop
from .micro_batch import MicroBatch


class UnisonLoop(SweepLoop):
    """A SweepLoop that makes the same steps on all ranks, in the same order: each
    product waits for the rows of the other ranks. What may differ between ranks (the
    seed, whether there is memory for one more micro-batch) the first rank decides."""

    def __init__(self, unison: Unison, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._unison = unison

    def begin(self, seed: int | None) -> None:
        super().begin(seed)
        self._seed = int(self._unison.agree("seed", self._seed))

    @property
    def _may_start(self) -> bool:
        if not self._input.has_more:
            return False
        return bool(self._unison.agree("start", super()._may_start))

    def _run(self, me: MicroBatch, piece: Callable[[], None]) -> None:
        super()._run(me, piece)
        if me.is_done and isinstance(me.error, RanksError):
            raise me.error  # nothing can go on


class RankedLoop(SweepLoop):
    """A SweepLoop in step with those of other ranks.

    A micro-batch may wait for a stage that another rank computes. A site is not passed
    while one is on its way to it, so that each is loaded once a pass: see `servable`.
    """

    def __init__(self, lockstep: Lockstep, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._lockstep = lockstep
        self._ended: dict[int, MicroBatch] = {}
        self._at: LapPosition | None = None
        """The position that was served last."""
        self._is_catching_up = False
        self._has_said_end = False

    @property
    def is_done(self) -> bool:
        return super().is_done and not self._ended

    @property
    def state(self) -> CallState:
        """The calls of the running micro-batch."""
        return self._lockstep.states[self.running.index]

    def begin(self, seed: int | None) -> None:
        super().begin(seed)
        self._seed = int(self._lockstep.agree(self._seed))

    def await_message(self, address: Address, source: int) -> None:
        """Suspends the running micro-batch until the message with `address` has come
        from the rank `source`, or never will."""
        me = self.running
        self._exit_if_stopping(me)
        self._lockstep.wait_for(me.index, address, source)
        stage = self._lockstep.states[me.index].stage
        self._module_state.look(me.index, me.last_site, -_FAR - stage)
        me.wait()
        self._exit_if_stopping(me)

    def arrive(self, site: int) -> None:
        if not self._is_stopping:
            self.state.num_sites += 1
        super().arrive(site)

    def round(self) -> None:
        with self._owner.at_work():
            self._admit()
            self._receive(blocks=False)
            site = self._next_site()
            if site is not None:
                self._serve(site)
            elif not self.finished:
                self._receive(blocks=True)

    def _receive(self, *, blocks: bool) -> None:
        """Continues the micro-batches whose messages have come. With `blocks`, waits
        for one."""
        lockstep = self._lockstep
        if blocks:
            follows = not lockstep.is_leader and self._input.has_more
            start = time.perf_counter()
            try:
                lockstep.wait(for_start=follows)
            finally:
                end = time.perf_counter()
                self._entry.rank_seconds += end - start
                if end - start > _SHOWN_SECONDS:
                    self._entry.record(RANKS, "other ranks", start, end)
        for index in lockstep.arrived():
            me = self._in_flight[index]
            self._run(me, me.resume)
        if blocks and not lockstep.is_leader:
            self._admit()
        for index, failure in lockstep.settled():
            me = self._ended.pop(index)
            if failure is not None and me.error is None:
                me.value = None
                me.error = PenstockError(f"micro-batch {index} failed {failure}")
            self.finished.append(me)

    def _waits(self) -> tuple[list[tuple[int, MicroBatch]], Waits]:
        """The micro-batches that wait at sites, and all waits together."""
        queues = ((site, self._waiting.all_at(site)) for site in self._waiting.sites())
        here = [(site, me) for site, queue in queues for me in queue]
        states = (self._lockstep.states[me.index] for _, me in here)
        places = [(state.position, state.num_sites <= 1) for state in states]
        return here, Waits(places, self._lockstep.coming())

    def _next_site(self) -> int | None:
        """The site to serve now; None if a message has to come first."""
        here, waits = self._waits()
        chosen = [here[index] for index in servable(waits)]
        if not chosen:
            return None
        # One inside of a site keeps the units of that site in use: it goes first.
        inner = [pair for pair in here if pair[1].inside]
        sites = {site for site, _ in inner or chosen}
        site = self._entry.next_of(sites)
        self._at = min(
            self._lockstep.states[me.index].position for s, me in here if s == site
        )
        return site

    def _take(self, site: int) -> MicroBatch | None:
        while True:
            self._receive(blocks=False)
            if not self._gathers and (me := super()._take(site)) is not None:
                return me
            if not self._others_are_coming:
                return None
            self._receive(blocks=True)

    @property
    def others_come(self) -> bool:
        return super().others_come or self._gathers

    @property
    def _others_are_coming(self) -> bool:
        """Whether the site that is open is waited for by one on its way to it."""
        return self._at is not None and is_waited_for(self._at, self._waits()[1])

    @property
    def _gathers(self) -> bool:
        """Whether micro-batches that are parked at the open site wait for others to
        come, to share products with them. They wait for one part of all, and each rank
        has a part then: none is idle, and no product is narrow."""
        serving = self._serving
        if serving is None or not self._coalescing.is_joining:
            return False
        if self._waiting.at(serving):
            return False
        num_here = sum(me.is_parked or me.is_current for me in self._in_flight)
        part = -(-len(self._in_flight) // self._lockstep.num_ranks)
        return 0 < num_here < part and self._others_are_coming

    @property
    def _may_start(self) -> bool:
        if self._lockstep.is_leader:
            return super()._may_start
        return self._input.has_more and self._lockstep.next_start() is not None

    def _admit(self) -> int:
        was_settled = self._admission.is_settled
        lockstep = self._lockstep
        self._is_catching_up = self._serving is not None and not was_settled
        num = super()._admit()
        if lockstep.is_leader:
            if not self._input.has_more and not self._has_said_end:
                self._has_said_end = True
                lockstep.exhaust()
        elif self._input.has_more and lockstep.is_exhausted():
            self._check_exhausted()
        elif not self._input.has_more and lockstep.next_start() is not None:
            raise RanksError(
                "ranks run different things: the first rank has more batches than this "
                "one: give all ranks the same batches"
            )
        # Another pass is begun by the first rank only; laps say it to the others.
        return num if lockstep.is_leader else 0

    def _check_exhausted(self) -> None:
        self._loop_state.resume()
        try:
            self._input.take()
        except StopIteration:
            return
        raise RanksError(
            "ranks run different things: this rank has more batches than the first "
            "one: give all ranks the same batches"
        )

    def _start(self, index: int, batch: Any) -> None:
        if self._lockstep.is_leader:
            self._lockstep.start(index, self._lap())
        else:
            start = self._lockstep.next_start()
            assert start is not None, "it may start"
            assert start[0] == index, "starts come in order"
            self._lockstep.take_start()
            self._lockstep.start(*start)
        super()._start(index, batch)

    def _lap(self) -> int:
        """The lap in which a micro-batch starts now: the one under way, if that is at
        its first site, or if the others catch up with the first of all."""
        if self._at is None:
            return 0
        joins = self._is_catching_up or self._entry.position is None
        joins = joins or self._serving == self._entry.order.first
        return self._at.lap + (not joins)

    def _run(self, me: MicroBatch, piece: Callable[[], None]) -> None:
        super()._run(me, piece)
        if not me.is_done:
            return
        assert self.finished[-1] is me, "it has just ended"
        self.finished.pop()
        self._ended[me.index] = me
        self._lockstep.end(me.index, me.error)
        if isinstance(me.error, RanksError):
            raise me.error  # nothing can go on

    def _begin_to_stop(self) -> None:
        is_early = not self._is_stopping and not self.is_done
        super()._begin_to_stop()
        self._lockstep.leave(sys.exception(), is_early=is_early)


_SHOWN_SECONDS = 1e-4
"""Shorter waits for other ranks are counted, and not recorded."""
_FAR = 1 << 20
"""Places where micro-batches wait for other ranks are numbered from here."""

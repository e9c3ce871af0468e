"""Loads units of which each rank reads a part: ranks send the parts to each other."""

import threading
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from multiprocessing.util import Finalize

from ...io.closing import Closing
from ...io.errors import ClosedError, PenstockError, RanksError
from ...io.event import Event
from ...io.pace import Pace
from ...io.readers.reader import Reader
from ...io.timeline import Record
from ...io.weights.layout import Layout
from ...io.weights.loader import Loader
from ...scheduler.ranks.load_order import Ask, LoadOrder
from ...scheduler.ranks.messages import Kind, Message
from ...scheduler.ranks.post import Post
from ...scheduler.ranks.rank_statistics import RankStatistics
from ...scheduler.ranks.stages import Address
from .rounds import Rounds, Wanted
from .sameness import check_same

REST_SECONDS = 0.5
"""After this long without a forward, a rank is not waited for any more."""
_NO_UNIT = -1


class GatheredLoad:
    """The load of one unit into a slot; see `Load`."""

    ready = None

    def __init__(self, owner: "GatheredLoads", wanted: Wanted) -> None:
        self._owner = owner
        self._wanted = wanted

    def wait(self) -> None:
        self._owner.need(self._wanted)
        self._wanted.handle.wait()
        inner = self._wanted.inner
        assert inner is not None, "a load without an error has its bytes"
        inner.wait()

    def wait_quietly(self) -> None:
        self._owner.drop(self._wanted)
        self._wanted.handle.wait_quietly()
        if self._wanted.inner is not None:
            self._wanted.inner.wait_quietly()


class GatheredLoads(Closing):
    """Loads the units of `layouts`, in the same order on all ranks of `post`.

    A thread speaks to the other ranks, whatever this rank's own forwards do: it reads
    this rank's part of each unit and sends it to those that want it. On the first rank
    it also decides what is loaded next. `loader_of(reader)` makes the loader that puts
    bytes into slots. `close` waits until all ranks have closed their model.
    """

    def __init__(
        self,
        post: Post,
        layouts: Sequence[Layout],
        reader: Reader,
        loader_of: Callable[[Reader], Loader],
        *,
        pace: Pace | None,
        record: Record,
    ) -> None:
        units = [(plan.nbytes, plan.stored_bytes, plan.tensors) for plan in layouts]
        mark = f"{zlib.crc32(repr(units).encode()):08x}"
        check_same(post, {"division into units": mark}, "ranks: gather")
        self._post = post
        self._changed = post.mail.changed
        self._rounds = Rounds(
            post, layouts, reader, loader_of, pace=pace, record=record, wake=self._wake
        )
        self.loader = self._rounds.loader
        self._order = LoadOrder(post.num_ranks, len(layouts)) if not post.rank else None
        self._pending: dict[int, Wanted] = {}
        self._num_rounds = 0
        self._is_busy: Callable[[], bool] = lambda: True  # until it is put together
        self._busy_at = 0.0
        self._rests = False
        self._has_said_rest = False
        self._is_ready = False
        self._at_end: Finalize | None = None
        self._has_left = False
        self._is_over = False
        self._is_closed = False
        self._failure: PenstockError | None = None
        self._thread = threading.Thread(
            target=self._work, name="penstock-gather", daemon=True
        )
        self._thread.start()

    # Called by the thread that runs the model.

    def load(self, unit: int, offset: int, after: tuple[Event, ...]) -> GatheredLoad:
        """Starts to load `unit` into the slot at `offset` (bytes)."""
        if self._has_left:
            raise ClosedError("this model is closed; load it again")
        wanted = self._rounds.want(unit, offset, after)
        with self._changed:
            if self._failure is not None:
                raise type(self._failure)(str(self._failure))
            assert unit not in self._pending, "a unit has one slot"
            self._pending[unit] = wanted
            self._works()
            self._say(Ask.WANT, unit)
        return GatheredLoad(self, wanted)

    def need(self, wanted: Wanted) -> None:
        """The caller waits for `wanted`."""
        with self._changed:
            if self._pending.get(wanted.unit) is wanted:
                self._works()
                self._say(Ask.NEED, wanted.unit)

    def drop(self, wanted: Wanted) -> None:
        """Nobody needs `wanted` any more: its load ends, unless it is under way."""
        with self._changed:
            if self._pending.get(wanted.unit) is not wanted:
                return
            del self._pending[wanted.unit]
            self._say(Ask.DROP, wanted.unit)
        wanted.handle.done(ClosedError("it was not needed any more"))

    def ready(self, is_busy: Callable[[], bool]) -> None:
        """The model is put together. `is_busy` says whether a sweep or a forward is
        under way here: others wait then for what this rank wants next."""
        self._busy_at = time.monotonic()
        self._is_busy = is_busy
        self._is_ready = True
        # Others may still need what this rank reads. Processes that multiprocessing has
        # started do not call what `atexit` knows.
        self._at_end = Finalize(None, self.close, exitpriority=0)

    @contextmanager
    def resting(self) -> Iterator[None]:
        """Meanwhile this rank waits for something else than weights, in a sweep."""
        self._rests = True
        try:
            yield
        finally:
            self._rests = False
            self._busy_at = time.monotonic()

    def withdraw(self) -> None:
        """No forward runs any more: what was loaded ahead is not needed."""
        for wanted in list(self._pending.values()):
            self.drop(wanted)

    def statistics(self) -> RankStatistics:
        return self._rounds.statistics()

    def close(self) -> None:
        """Goes on reading for the others until all have closed their model."""
        if self._is_closed:
            return
        self._is_closed = True
        if self._at_end is not None:
            self._at_end.cancel()
        self.withdraw()
        with self._changed:
            self._has_left = True
            if not self._is_ready:
                self._is_over = True  # whoever made it says why
            elif self._failure is None:
                self._say(Ask.LEAVE)
            self._changed.notify_all()
        self._thread.join()
        self._rounds.close()
        if self._is_ready:
            self._post.close()

    # The thread that speaks to the other ranks.

    def _work(self) -> None:
        try:
            while not self._is_over:
                self._post.wait(self._has_news, is_idle=True)
                self._step()
        except Exception as error:
            self._fail(error)

    def _has_news(self) -> bool:
        mail = self._post.mail
        if mail.lost or mail.of_loads or self._is_over or self._is_rested:
            return True
        return self._rounds.has_news or bool(self._gone())

    @property
    def _is_rested(self) -> bool:
        """Whether the first rank has to hear that this one rests."""
        if self._has_said_rest or self._has_left:
            return False
        now = time.monotonic()
        if self._is_busy() and not self._rests:
            self._busy_at = now
        return now - self._busy_at >= REST_SECONDS

    def _works(self) -> None:
        """It computes: the others wait again for what it wants."""
        self._busy_at = time.monotonic()
        if self._has_said_rest:
            self._has_said_rest = False
            self._say(Ask.WORK)

    def _gone(self) -> str:
        """Why ranks have ended that others still need; empty if none has."""
        mail = self._post.mail
        others = (r for r in range(self._post.num_ranks) if r != self._post.rank)
        closed = [str(why) for rank in others if (why := mail.gone(rank)) is not None]
        if self._has_left:  # the others may have heard before that all have left
            closed = [why for why in closed if "has failed" in why or mail.lost]
        return closed[0] if closed else ""

    def _step(self) -> None:
        mail = self._post.mail
        if why := self._gone():
            raise RanksError(why)
        with self._changed:
            if self._is_rested:
                self._has_said_rest = True
                self._say(Ask.REST)
            said = list(mail.of_loads)
            mail.of_loads.clear()
        for source, message in said:
            if message.kind is Kind.ASK and self._order is not None:
                ask = Ask(message.fingerprint)
                self._order.hear(source, ask, message.stage)
            elif message.kind is Kind.LOAD:
                takers = [int(rank) for rank in message.text.split()]
                self._begin(message.address.micro_batch, message.stage, takers)
        if self._order is not None:
            self._decide(self._order)
        self._rounds.advance()

    def _decide(self, order: LoadOrder) -> None:
        """Says what is loaded next, if that is clear now. Only on the first rank."""
        while (found := order.next()) is not None:
            self._tell_load(*found)
        if order.is_over and not self._is_over:
            self._tell_load(_NO_UNIT, ())

    def _tell_load(self, unit: int, takers: Sequence[int]) -> None:
        address = Address(0, self._num_rounds, 0, 0)
        self._num_rounds += 1
        text = " ".join(map(str, takers))
        for rank in range(1, self._post.num_ranks):
            message = Message(Kind.LOAD, address, stage=unit, text=text)
            self._post.send(rank, message)
        self._begin(address.micro_batch, unit, takers)

    def _begin(self, number: int, unit: int, takers: Sequence[int]) -> None:
        if unit == _NO_UNIT:
            self._is_over = True
            return
        with self._changed:
            wanted = self._pending.get(unit)
            if self._post.rank in takers:
                self._pending.pop(unit, None)
        self._rounds.begin(number, unit, takers, wanted)

    def _fail(self, error: Exception) -> None:
        """Ends all loads with `error`, and all that follow."""
        if not isinstance(error, PenstockError):
            error = RanksError(f"the loads of all ranks: {error!r}")
        with self._changed:
            self._failure = error
            waiting = list(self._pending.values())
            waiting += self._rounds.give_up()
            self._pending.clear()
        for wanted in waiting:
            wanted.handle.done(type(error)(str(error)))
        if not self._post.mail.lost:
            self._post.close(str(error))

    def _wake(self) -> None:
        with self._changed:
            self._changed.notify_all()

    def _say(self, ask: Ask, unit: int = 0) -> None:
        """Tells the first rank. Called with `changed` held, so that what is said keeps
        its order."""
        message = Message(Kind.ASK, stage=unit, fingerprint=int(ask))
        if self._post.rank:
            self._post.send(0, message)
        else:
            self._post.mail.deliver(0, message)

"""Single loads that all ranks take part in, from the read of each rank's part on."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch

from ...io.closing import Closing
from ...io.errors import PenstockError, RanksError, readable
from ...io.event import Event
from ...io.handle import Handle
from ...io.pace import Pace
from ...io.readers.reader import Reader
from ...io.timeline import Record
from ...io.weights.layout import Layout
from ...io.weights.loader import Loader, UnitLoad
from ...scheduler.ranks.messages import Kind, Message
from ...scheduler.ranks.post import Post
from ...scheduler.ranks.rank_statistics import RankStatistics
from ...scheduler.ranks.stages import Address
from .gather_plan import GatherPlan
from .gathered_bytes import Gathered, GatheredReader
from .own_parts import OwnPart, OwnParts


@dataclass(eq=False)
class Wanted:
    """A unit that this rank has a slot for."""

    unit: int
    offset: int
    """Where the slot begins, in bytes."""
    after: tuple[Event, ...]
    own: OwnPart
    """This rank's part of it, which is read at once, before its turn comes."""
    handle: Handle = field(default_factory=lambda: Handle(1))
    """Done once its bytes are here, or will never be."""
    inner: UnitLoad | None = None
    """Makes the unit of the bytes."""


@dataclass(eq=False)
class _Round:
    number: int
    unit: int
    takers: Sequence[int]
    own: OwnPart
    wanted: Wanted | None
    is_sent: bool = False
    parts: dict[int, torch.Tensor] = field(default_factory=dict)
    error: Exception | None = None


class Rounds(Closing):
    """The loads that are under way on this rank. In each, every rank reads its part of
    a unit, and sends it to those that want the unit. `wake` is called when a part has
    been read: then `advance` goes on. Used by one thread, but for `want`.

    `loader_of(reader)` makes the loader that puts bytes into slots.
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
        wake: Callable[[], None],
    ) -> None:
        self._post = post
        self._plans = [GatherPlan(plan, post.num_ranks) for plan in layouts]
        self._gathered = GatheredReader(reader)
        self.loader = loader_of(self._gathered)
        self._own = OwnParts(reader, post.rank, pace, record, wake)
        self._rounds: list[_Round] = []
        self._bytes_sent = 0
        self._num_sent = 0

    def want(self, unit: int, offset: int, after: tuple[Event, ...]) -> Wanted:
        """This rank wants `unit`. Begins to read its own part. Called by any thread."""
        return Wanted(unit, offset, after, self._own.read(self._plans[unit]))

    def begin(
        self, number: int, unit: int, takers: Sequence[int], wanted: Wanted | None
    ) -> None:
        """Load `number` begins, which is of `unit`. `wanted` says where this rank wants
        it, if it does."""
        own = wanted.own if wanted else self._own.read(self._plans[unit])
        is_taken = self._post.rank in takers
        self._rounds.append(
            _Round(number, unit, takers, own, wanted if is_taken else None)
        )

    @property
    def has_news(self) -> bool:
        """Whether `advance` would do something."""
        mail = self._post.mail
        for one in self._rounds:
            if not one.is_sent:
                if one.own.is_done:
                    return True
                continue
            for rank in self._missing(one):
                if mail.is_ready(_address(one.number, rank), rank):
                    return True
        return False

    def advance(self) -> None:
        """Sends and takes what can be. Raises RanksError if a rank is gone."""
        mail = self._post.mail
        for one in list(self._rounds):
            if not one.is_sent:
                if not one.own.is_done:
                    continue
                self._send(one)
            for rank in self._missing(one):
                address = _address(one.number, rank)
                if mail.is_ready(address, rank):
                    self._take(one, rank, mail.take(address, rank))
            if not self._missing(one):
                self._rounds.remove(one)
                self._finish(one)

    def give_up(self) -> list[Wanted]:
        """Ends all that is under way. Returns what was wanted of it."""
        found = [one.wanted for one in self._rounds if one.wanted is not None]
        self._rounds.clear()
        return found

    def statistics(self) -> RankStatistics:
        return RankStatistics(
            num_ranks=self._post.num_ranks,
            bytes_sent=self._bytes_sent,
            num_sent=self._num_sent,
        )

    def close(self) -> None:
        self._own.close()
        self.loader.close()

    def _missing(self, one: _Round) -> list[int]:
        """The ranks whose parts of a unit that is wanted here have not come."""
        if self._post.rank not in one.takers:
            return []
        return [rank for rank in range(self._post.num_ranks) if rank not in one.parts]

    def _send(self, one: _Round) -> None:
        """Sends this rank's part, or why it could not be read."""
        own, rank = one.own, self._post.rank
        error, tensor = own.error, None
        if error is None:
            tensor = own.tensor
            one.parts[rank] = tensor
        else:
            one.error = error
            one.parts[rank] = torch.empty(0, dtype=torch.uint8)
        text = "" if error is None else readable(str(error) or type(error).__name__)
        for to in one.takers:
            if to == rank:
                continue
            message = Message(
                Kind.OUTPUT, _address(one.number, rank), one.unit, 0, text, tensor
            )
            self._post.send(to, message)
            self._num_sent += 1
            self._bytes_sent += own.nbytes
        one.is_sent = True

    def _take(self, one: _Round, rank: int, message: Message) -> None:
        start, end = self._plans[one.unit].part(rank)
        tensor = message.tensor
        if message.text:
            tensor = torch.empty(0, dtype=torch.uint8)
            one.error = one.error or PenstockError(
                f"rank {rank} could not read its part: {message.text}"
            )
        elif tensor is None or tensor.numel() != end - start:
            raise RanksError(
                f"ranks run different things: rank {rank} sent another part of "
                f"{self._plans[one.unit].name!r} than is needed here"
            )
        one.parts[rank] = tensor

    def _finish(self, one: _Round) -> None:
        """All bytes of a unit are here: puts them into its slot."""
        if (wanted := one.wanted) is None:
            return
        if one.error is not None:
            name, error = self._plans[one.unit].name, one.error
            kind = type(error) if isinstance(error, PenstockError) else PenstockError
            wanted.handle.done(kind(f"unit {name!r}: {error}"))
            return
        parts = [one.parts[rank] for rank in range(self._post.num_ranks)]
        unit = Gathered(self._plans[one.unit], parts)
        self._gathered.add(unit)
        try:
            wanted.inner = self.loader.load(one.unit, wanted.offset, wanted.after)
        except Exception as error:
            self._gathered.remove(unit)
            wanted.handle.done(error)
            return
        wanted.inner.when_done(lambda: self._gathered.remove(unit))
        wanted.handle.done()


def _address(number: int, rank: int) -> Address:
    """That of the part of `rank` in a load."""
    return Address(0, number, rank, 0)

"""One run of a sweep on this rank, in step with the same run on the other ranks."""

import json
from collections.abc import Sequence
from typing import Any

from ...io.errors import PenstockError, RanksError, readable
from .messages import Kind, Message
from .post import Post
from .stages import Address, CallState, LapPosition, RankStages


class Lockstep:
    """What a sweep loop asks and tells the other ranks.

    The first rank decides when a micro-batch starts, and in which lap; the others
    follow. A micro-batch has ended once it has on all ranks; if it failed on one, it
    fails on all.
    """

    def __init__(self, post: Post, stages: RankStages, run: int) -> None:
        self.stages = stages
        self.states: dict[int, CallState] = {}
        """The micro-batches that have started here and not ended."""
        self.unconfirmed: list[int] = []
        """Those that have ended here, and not yet everywhere."""
        self._post = post
        self._run = run
        self._coming: dict[int, tuple[Address, int]] = {}
        self._is_over = False

    @property
    def is_leader(self) -> bool:
        """Whether this is the first rank."""
        return self._post.rank == 0

    @property
    def num_ranks(self) -> int:
        return self._post.num_ranks

    @property
    def others(self) -> Sequence[int]:
        return [rank for rank in range(self._post.num_ranks) if rank != self._post.rank]

    def agree(self, value: Any) -> Any:
        """The first rank's `value`, which JSON can hold, on all ranks."""
        return agreed(self._post, value)

    def start(self, index: int, lap: int) -> None:
        """Micro-batch `index` starts in `lap`; the first rank tells the others."""
        self.states[index] = CallState(self._run, index, lap)
        if self.is_leader:
            address = Address(self._run, index, 0, 0)
            self._tell(Message(Kind.STARTED, address, stage=lap))

    def exhaust(self) -> None:
        """There are no more micro-batches, says the first rank."""
        self._tell(Message(Kind.EXHAUSTED, Address(self._run, 0, 0, 0)))

    def next_start(self) -> tuple[int, int] | None:
        """The index and the lap of the micro-batch that the first rank has started
        next; None if it has not said."""
        self._post.collect()
        start = self._post.mail.next_start(self._run)
        if start is None or start.kind is Kind.EXHAUSTED:
            return None
        return start.address.micro_batch, start.stage

    def is_exhausted(self) -> bool:
        """Whether the first rank has said that there are no more."""
        start = self._post.mail.next_start(self._run)
        return start is not None and start.kind is Kind.EXHAUSTED

    def take_start(self) -> None:
        self._post.mail.take_start(self._run)

    def end(self, index: int, error: BaseException | None) -> None:
        """Micro-batch `index` has ended here."""
        state = self.states.pop(index)
        address = Address(self._run, index, state.attempt, state.call)
        if error is None:
            self._tell(Message(Kind.DONE, address))
        else:
            what = str(error)
            if not isinstance(error, PenstockError):
                what = f"{type(error).__name__}: {error}"
            self._tell(Message(Kind.FAILED, address, text=readable(what)))
        self.unconfirmed.append(index)

    def settled(self) -> list[tuple[int, str | None]]:
        """Those that have ended everywhere now, each with the error of another rank, if
        there is one. Raises RanksError."""
        self._post.collect()
        mail, found = self._post.mail, []
        for index in list(self.unconfirmed):
            if mail.is_confirmed(self._run, index, self.others):
                found.append((index, mail.failure(self._run, index)))
                self.unconfirmed.remove(index)
                mail.forget(self._run, index)
        return found

    def wait_for(self, index: int, address: Address, source: int) -> None:
        """Micro-batch `index` waits for the message with `address` from `source`."""
        state = self.states[index]
        state.target = self.stages.next_own(state.position)
        self._coming[index] = address, source

    def coming(self) -> list[LapPosition]:
        """Where those that wait for other ranks run here next."""
        targets = (self.states[index].target for index in self._coming)
        return [target for target in targets if target is not None]

    def arrived(self) -> list[int]:
        """The micro-batches whose message has come, or will never come."""
        self._post.collect()
        found = [index for index in self._coming if self._is_ready(index)]
        for index in found:
            del self._coming[index]
            self.states[index].target = None
        return found

    def wait(self, *, for_start: bool) -> None:
        """Blocks until there is something new: for one that waits or has ended or, with
        `for_start`, of the first rank. Raises RanksError if a rank is lost."""
        mail = self._post.mail

        def is_new() -> bool:
            return (
                bool(mail.lost)
                or any(self._is_ready(index) for index in self._coming)
                or (for_start and mail.has_start(self._run))
                or any(
                    mail.is_confirmed(self._run, index, self.others)
                    for index in self.unconfirmed
                )
            )

        if not (self._coming or self.unconfirmed or for_start):
            return
        self._post.wait(is_new)
        if mail.lost:
            raise RanksError(mail.lost)

    def leave(self, why: BaseException | None, *, is_early: bool) -> None:
        """The run has ended here. With `is_early`, the others are told."""
        if self._is_over:
            return
        self._is_over = True
        if is_early:
            address = Address(self._run, 0, 0, 0)
            text = "" if why is None else readable(str(why) or type(why).__name__)
            self._tell(Message(Kind.LEFT, address, text=text))
        self._post.mail.end_run(self._run)
        self._coming.clear()

    def _is_ready(self, index: int) -> bool:
        return self._post.mail.is_ready(*self._coming[index])

    def _tell(self, message: Message) -> None:
        for rank in self.others:
            self._post.send(rank, message)


def agreed(post: Post, value: Any) -> Any:
    """The first rank's `value` on all ranks. Of what JSON cannot hold, the others have
    the name of its type, in a dictionary: no string that they would take for text.
    Raises RanksError if the first rank is gone."""
    if post.rank == 0:
        message = Message(Kind.SHARED, text=json.dumps(value, default=_stand_in))
        for rank in range(1, post.num_ranks):
            post.send(rank, message)
        return value
    post.wait(post.mail.has_shared)
    return json.loads(post.mail.take_shared())


def _stand_in(value: Any) -> dict[str, str]:
    return {"type": type(value).__name__}


def least(post: Post, value: int) -> int:
    """The least of all ranks' `value`, on all of them: all make their calls of this and
    of `agreed` in the same order. Raises RanksError if a rank is gone."""
    if post.rank:
        post.send(0, Message(Kind.SHARED, text=json.dumps(value)))
        return int(agreed(post, None))
    mail, others = post.mail, range(1, post.num_ranks)

    def is_gone() -> bool:
        return any(mail.gone(rank) is not None for rank in others)

    for _ in others:
        post.wait(lambda: mail.has_shared() or is_gone())
        if not mail.has_shared():
            raise next(filter(None, map(mail.gone, others)))
        value = min(value, int(json.loads(mail.take_shared())))
    return int(agreed(post, value))

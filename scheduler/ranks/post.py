"""What sends messages from this rank to the others, and keeps those that came."""

import threading
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from typing import Protocol

import torch

from ...io.errors import PenstockError, RanksError
from .messages import Kind, Message
from .stages import PLAIN, Address


class Mailbox:
    """The messages that have come to one rank. Any thread may `deliver`; one takes."""

    def __init__(self) -> None:
        self.changed = threading.Condition(threading.RLock())
        self.lost = ""
        """Why a rank is lost; then nothing that one waits for may come."""
        self._outputs: dict[Address, tuple[int, Message]] = {}
        self._errors: dict[tuple[int, int], tuple[int, Message]] = {}
        self._failed: dict[tuple[int, int], tuple[int, str]] = {}
        self._done: dict[tuple[int, int], dict[int, Address]] = {}
        self._starts: dict[int, deque[Message]] = {}
        self._shared: deque[str] = deque()
        self._left: dict[tuple[int, int], str] = {}
        self.of_loads: deque[tuple[int, Message]] = deque()
        """What was said of loads (ASK and LOAD), with the rank that said it."""
        self._closed: dict[int, str] = {}
        self._oldest_run = 0

    def deliver(self, source: int, message: Message) -> None:
        """Keeps `message`, which has come from the rank `source`."""
        with self.changed:
            self._keep(source, message)
            self.changed.notify_all()

    def lose(self, why: str) -> None:
        """A rank is gone: whoever waits for a message is told `why`."""
        with self.changed:
            self.lost = self.lost or why
            self.changed.notify_all()

    def _keep(self, source: int, message: Message) -> None:
        kind, address = message.kind, message.address
        run, who = address.run, address[:2]
        if kind is Kind.BYE:
            why = (
                f"has failed: {message.text}"
                if message.text
                else "has closed its model"
            )
            self._closed[source] = f"rank {source} {why}"
        elif kind is Kind.SHARED:
            self._shared.append(message.text)
        elif kind in (Kind.ASK, Kind.LOAD):
            self.of_loads.append((source, message))
        elif run != PLAIN and run < self._oldest_run:
            pass  # it is late: the run has ended here
        elif kind is Kind.OUTPUT:
            self._outputs[address] = source, message
        elif kind is Kind.ERROR:
            self._errors[who] = source, message
        elif kind is Kind.FAILED:
            self._failed.setdefault(who, (source, message.text))
        elif kind is Kind.DONE:
            self._done.setdefault(who, {})[source] = address
        elif kind is Kind.LEFT:
            self._left[run, source] = message.text
        elif kind in (Kind.STARTED, Kind.EXHAUSTED):
            self._starts.setdefault(run, deque()).append(message)

    def is_ready(self, address: Address, source: int) -> bool:
        """Whether `take` would return a message, or raise: from `source` nothing more
        can come."""
        with self.changed:
            return address in self._outputs or self._reason(address, source) is not None

    def take(self, address: Address, source: int) -> Message:
        """The message with `address`. Raises why there is none."""
        with self.changed:
            if address in self._outputs:
                return self._outputs.pop(address)[1]
            reason = self._reason(address, source)
        assert reason is not None, "it is ready"
        raise reason

    def _reason(self, address: Address, source: int) -> Exception | None:
        """Why the message with `address` will not come; None if it may."""
        who = address[:2]
        if (error := self._errors.get(who)) and (
            error[1].address.attempt >= address.attempt
        ):
            return call_failed(*error)
        if failed := self._failed.get(who):
            return PenstockError(
                f"micro-batch {address.micro_batch} failed on rank {failed[0]}: "
                f"{failed[1]}"
            )
        if self.lost:
            return RanksError(self.lost)
        done = self._done.get(who, {}).get(source)
        if done is not None:
            return RanksError(
                f"ranks run different things: rank {source} has ended micro-batch "
                f"{address.micro_batch} after {done.call} calls, and call "
                f"{address.call} is waited for: give all ranks the same function and "
                "the same batches"
            )
        return self._gone(address.run, source)

    def _gone(self, run: int, source: int) -> Exception | None:
        if self.lost:
            return RanksError(self.lost)
        left = self._left.get((run, source))
        if left is not None:
            return RanksError(f"rank {source} has left the sweep: {left or 'closed'}")
        closed = self._closed.get(source)
        return None if closed is None else RanksError(closed)

    def gone(self, source: int) -> Exception | None:
        """Why nothing more comes from the rank `source`; None if something may."""
        with self.changed:
            return self._gone(PLAIN, source)

    def has_start(self, run: int) -> bool:
        """Whether the first rank has said how `run` goes on, or never will."""
        with self.changed:
            return bool(self._starts.get(run)) or self._gone(run, 0) is not None

    def next_start(self, run: int) -> Message | None:
        """The first STARTED or EXHAUSTED of `run`, which stays; None if there is none
        yet. Raises RanksError if none will come."""
        with self.changed:
            if starts := self._starts.get(run):
                return starts[0]
            if (reason := self._gone(run, 0)) is not None:
                raise reason
            return None

    def take_start(self, run: int) -> Message:
        with self.changed:
            return self._starts[run].popleft()

    def has_shared(self) -> bool:
        with self.changed:
            return bool(self._shared) or self._gone(PLAIN, 0) is not None

    def take_shared(self) -> str:
        """The next value of the first rank. Raises RanksError if none will come."""
        with self.changed:
            if self._shared:
                return self._shared.popleft()
            reason = self._gone(PLAIN, 0)
        assert reason is not None, "there is one"
        raise reason

    def failure(self, run: int, micro_batch: int) -> str | None:
        """Why another rank failed the micro-batch; None if none did."""
        with self.changed:
            failed = self._failed.get((run, micro_batch))
            return None if failed is None else f"on rank {failed[0]}: {failed[1]}"

    def is_confirmed(self, run: int, micro_batch: int, others: Iterable[int]) -> bool:
        """Whether all `others` have ended the micro-batch. Raises RanksError if one of
        them never will."""
        with self.changed:
            if (run, micro_batch) in self._failed:
                return True
            done = self._done.get((run, micro_batch), {})
            waited = [rank for rank in others if rank not in done]
            for rank in waited:
                if (reason := self._gone(run, rank)) is not None:
                    raise reason
            return not waited

    def forget(self, run: int, micro_batch: int) -> None:
        """Drops what is known of a micro-batch that has ended on all ranks."""
        with self.changed:
            who = (run, micro_batch)
            for known in (self._errors, self._failed, self._done):
                known.pop(who, None)
            for address in [one for one in self._outputs if one[:2] == who]:
                del self._outputs[address]

    def end_run(self, run: int) -> None:
        """Drops all messages of `run` and of those before it, and those that come
        later."""
        with self.changed:
            self._oldest_run = max(self._oldest_run, run + 1)
            self._starts.pop(run, None)
            for known in (self._errors, self._failed, self._done):
                for who in [one for one in known if PLAIN < one[0] <= run]:
                    del known[who]
            for address in [a for a in self._outputs if PLAIN < a.run <= run]:
                del self._outputs[address]


def call_failed(source: int, message: Message) -> Exception:
    """The error of a call that failed on the rank `source`."""
    text = f"on rank {source}: {message.text}"
    return PenstockError(text) if message.stage else RuntimeError(text)


Empty = Callable[[Sequence[int], torch.dtype], torch.Tensor]


def pageable(shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="cpu")


class Post(Protocol):
    """Sends messages to other ranks. Messages from one rank to another arrive in the
    order in which they were sent; those of different ranks in any order."""

    mail: Mailbox
    empty: Empty
    """Makes the host memory that tensors are received in."""

    @property
    def rank(self) -> int: ...

    @property
    def num_ranks(self) -> int: ...

    def send(self, to: int, message: Message) -> None:
        """Sends `message` to the rank `to`, and does not wait until it is there, nor
        for its tensor, a `HostCopy`, to arrive from an accelerator. Another tensor may
        be changed afterwards. Does nothing if that rank has closed. It may be this rank
        itself: its mail has the message once the tensor has arrived."""
        ...

    def collect(self) -> None:
        """Puts what has come into `mail`; does not block."""
        ...

    def wait(self, test: Callable[[], bool], *, is_idle: bool = False) -> None:
        """Blocks until `test` is true, which asks `mail`, or a rank is lost. It is
        asked again a few times a second. With `is_idle`, this rank has other threads
        that go on: it does not count as one that waits for others."""
        ...

    def close(self, why: str = "") -> None:
        """Says to all others that nothing more comes, and `why` if it is an error."""
        ...

"""Ranks as threads of one process: messages come when seeded dice say so."""

from __future__ import annotations

import random
import threading
from collections import deque
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from penstock.io.devices.host_copy import HostCopy
from penstock.io.errors import PenstockError
from penstock.scheduler.ranks.messages import Kind, Message
from penstock.scheduler.ranks.post import Empty, Mailbox, pageable


class DeadlockError(PenstockError):
    """All ranks wait, and no message is on its way."""


class Office:
    """The mail of `num` ranks. A message is delivered when its receiver looks and the
    dice say so, or when it waits; then all at once, of one sender after the other."""

    def __init__(self, num: int, seed: int, chance: float = 0.3) -> None:
        self.num = num
        self.chance = chance
        self.random = random.Random(seed)
        self.lock = threading.Condition(threading.RLock())
        self.ways: dict[tuple[int, int], deque[Message]] = {
            (a, b): deque() for a in range(num) for b in range(num)
        }
        self.still: set[int] = set()
        self.alive = set(range(num))
        self.is_deadlock = False
        self.dropped: set[int] = set()
        self.posts = [FakePost(rank, self) for rank in range(num)]

    def leave(self, rank: int) -> None:
        """The thread of `rank` has ended."""
        with self.lock:
            self.alive.discard(rank)
            self.lock.notify_all()

    def kill(self, rank: int) -> None:
        """`rank` dies: the others lose it, and it hears nothing more."""
        with self.lock:
            self.dropped.add(rank)
            for post in self.posts:
                if post.rank != rank:
                    post.mail.lose(f"rank {rank} is gone: it was killed")
            self.leave(rank)


class FakePost:
    """The post of one rank of an `Office`. All ranks share the office's lock."""

    def __init__(self, rank: int, office: Office) -> None:
        self.rank = rank
        self.num_ranks = office.num
        self.office = office
        self.empty: Empty = pageable
        self.mail = Mailbox()
        self.mail.changed = office.lock
        self.num_outputs = 0

    def send(self, to: int, message: Message) -> None:
        with self.office.lock:
            tensor = message.tensor
            if isinstance(tensor, HostCopy) and not tensor.is_copy:
                message = replace(message, tensor=tensor.wait().clone())
            self.office.ways[self.rank, to].append(message)
            self.num_outputs += message.kind is Kind.OUTPUT
            self.office.lock.notify_all()

    def collect(self) -> None:
        with self.office.lock:
            self._pull(self.office.chance)

    def wait(self, test: Callable[[], bool], *, is_idle: bool = False) -> None:
        office = self.office
        with office.lock:
            while True:
                self._pull(office.chance)
                if test() or self.mail.lost:
                    break
                if self._pull_one():
                    continue
                if is_idle:
                    office.lock.wait(0.02)
                    continue
                office.still.add(self.rank)
                if office.is_deadlock or (
                    office.still >= office.alive and not self._is_any_mail()
                ):
                    office.is_deadlock = True
                    office.lock.notify_all()
                    raise DeadlockError("all ranks wait for each other")
                office.lock.wait(5)
                office.still.discard(self.rank)
            office.still.discard(self.rank)

    def close(self, why: str = "") -> None:
        for to in range(self.num_ranks):
            if to != self.rank and self.rank not in self.office.dropped:
                self.send(to, Message(Kind.BYE, text=why))

    def _deliver(self, source: int, way: deque[Message]) -> None:
        message = way.popleft()
        if isinstance(message.tensor, HostCopy):
            message = replace(message, tensor=message.tensor.wait())
        self.mail.deliver(source, message)

    def _is_any_mail(self) -> bool:
        return any(
            way for (_, to), way in self.office.ways.items() if to in self.office.alive
        )

    def _pull(self, chance: float) -> None:
        for source in range(self.num_ranks):
            way: Any = self.office.ways.get((source, self.rank))
            while way and self.office.random.random() < chance:
                self._deliver(source, way)

    def _pull_one(self) -> bool:
        """Delivers one message of a sender by chance. False if none is on its way."""
        ways = [
            (source, way)
            for (source, to), way in self.office.ways.items()
            if to == self.rank and way
        ]
        if not ways:
            return False
        source, way = self.office.random.choice(ways)
        self._deliver(source, way)
        return True

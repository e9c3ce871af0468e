"""Finds out that all ranks wait for each other, by what each says of itself."""

import time
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(slots=True)
class _Heard:
    """What a rank has said last."""

    at: float
    """When that was."""
    since: float
    """When it first said the same."""
    waits: bool
    num_events: int


class StuckWatch:
    """Watches `num_others` ranks. What they said counts for `fresh_seconds`; if all of
    them, and this one, say for `stuck_seconds` that they wait, and no message has come
    to any, then none will."""

    def __init__(
        self,
        num_others: int,
        fresh_seconds: float,
        stuck_seconds: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._num_others = num_others
        self._fresh_seconds = fresh_seconds
        self._stuck_seconds = stuck_seconds
        self._clock = clock
        self._heard: dict[int, _Heard] = {}
        self._own: tuple[int, float] | None = None

    def hear(self, rank: int, waits: bool, num_events: int) -> None:
        """`rank` says whether it waits, and how many messages it has had and sent."""
        now, before = self._clock(), self._heard.get(rank)
        is_same = (
            before is not None
            and (before.waits, before.num_events) == (waits, num_events)
            and now - before.at <= self._fresh_seconds
        )
        since = before.since if is_same and before is not None else now
        self._heard[rank] = _Heard(now, since, waits, num_events)

    def is_stuck(self, num_events: int) -> bool:
        """Asked again and again by this rank while it waits, with the number of its own
        messages."""
        now = self._clock()
        if self._own is None or self._own[0] != num_events:
            self._own = num_events, now
        since = [self._own[1]]
        for one in self._heard.values():
            if not one.waits or now - one.at > self._fresh_seconds:
                return False
            since.append(one.since)
        is_all = len(self._heard) == self._num_others
        return is_all and now - max(since) >= self._stuck_seconds

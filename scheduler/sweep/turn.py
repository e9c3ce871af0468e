"""The turn to run a model: a lock held by one sweep, or by one thread for its calls."""

import threading
from collections.abc import Callable
from typing import Any, Protocol

from ...io import handle
from ...io.errors import PenstockError
from ..activations.frames import wait_of

_POLL_SECONDS = 0.2
_STUCK_POLLS = 10


class RunningLoop(Protocol):
    """A sweep loop, as the turn sees it."""

    @property
    def is_running(self) -> bool:
        """Whether a micro-batch is running, and not the loop."""
        ...


class Turn:
    """A reentrant lock whose owner is the object `who`, not a thread: a sweep may be
    ended, and its turn given back, by a thread that did not begin it.

    All methods may be called by any thread, and by finalisers that the garbage
    collector runs at any point of the program.
    """

    def __init__(self) -> None:
        # Its lock is reentrant: a finaliser may run while this thread holds the lock.
        self._changed = threading.Condition()
        self._owner: Any = None
        self._depth = 0

    @property
    def owner(self) -> Any:
        """The current owner; None if the turn is free."""
        return self._owner

    def take(self, who: Any, *, timeout_seconds: float = 0.0) -> bool:
        """Waits for the turn, at most `timeout_seconds`. Returns whether `who` has it
        now."""
        with self._changed:
            if not self._changed.wait_for(
                lambda: self._owner is None or self._owner == who, timeout_seconds
            ):
                return False
            self._owner = who
            self._depth += 1
            return True

    def wait(self, who: Callable[[], Any], is_waited_for: Callable[[], bool]) -> Any:
        """Waits for the turn in the name of `who()`, which is asked again at each poll:
        another thread may close the caller's sweep meanwhile. Returns the owner. Raises
        PenstockError if `is_waited_for` is true for `_STUCK_POLLS` polls in a row."""
        owner, polls = who(), 0
        while not self.take(owner, timeout_seconds=_POLL_SECONDS):
            polls = polls + 1 if is_waited_for() else 0
            if polls >= _STUCK_POLLS:
                raise PenstockError(
                    "the thread that sweeps waits for this thread, which waits for the "
                    "sweep: call the model from the micro-batch's own thread (a "
                    "streamer's thread cannot take part in a sweep)"
                )
            owner = who()
        return owner

    def give_back(self, who: Any) -> None:
        """Undoes one `take`. Does nothing if `who` does not own the turn any more."""
        with self._changed:
            if self._owner == who:
                self._depth -= 1
                if self._depth <= 0:
                    self._free()

    def hand_over(self, who: Any, to: Any, *, is_once: bool = False) -> bool:
        """Makes `to` the owner in place of `who`, as after one `take`. Returns False,
        and changes nothing, if `who` is not the owner or, with `is_once`, has taken the
        turn more than once."""
        with self._changed:
            if self._owner != who or (is_once and self._depth > 1):
                return False
            self._owner, self._depth = to, 1
            return True

    def give_up(self, who: Any) -> None:
        """Frees the turn if `who` owns it, however often `who` took it."""
        with self._changed:
            if self._owner == who:
                self._free()

    def _free(self) -> None:
        self._owner, self._depth = None, 0
        self._changed.notify_all()


def is_waited_for(loop_thread: int, loop: RunningLoop | None) -> bool:
    """Whether the thread that runs `loop` may wait for the caller's thread: it has
    called `join` on it, or a micro-batch waits for a lock, which the caller's thread
    may hold. Waiting for a read of weights does not count.
    """
    waits = wait_of(loop_thread, not_in=handle.__file__)
    in_lock = waits == "lock" and loop is not None and loop.is_running
    return waits == "caller" or in_lock

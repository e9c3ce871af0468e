"""The turn to run a model: a lock held by one sweep, or by one thread for its calls."""

import threading
from typing import Any


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

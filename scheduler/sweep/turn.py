"""The turn to run a model: one sweep has it, or one thread for its plain calls."""

import threading
from typing import Any


class Turn:
    """A lock that belongs to `who` takes it, not to a thread: a sweep may be ended, and
    its turn given back, by a thread that did not begin it.

    Who has it may take it again, and gives it back as often. Called by any thread, by
    the garbage collector's finalisers in the middle of anything.
    """

    def __init__(self) -> None:
        # A condition has a lock that its thread may take again, which a finaliser does.
        self._changed = threading.Condition()
        self._owner: Any = None
        self._depth = 0

    @property
    def owner(self) -> Any:
        """Who has it now; None if nobody."""
        return self._owner

    def take(self, who: Any, *, timeout_seconds: float = 0.0) -> bool:
        """Waits at most that long. Returns whether `who` has the turn."""
        with self._changed:
            if not self._changed.wait_for(
                lambda: self._owner is None or self._owner == who, timeout_seconds
            ):
                return False
            self._owner = who
            self._depth += 1
            return True

    def give_back(self, who: Any) -> None:
        """Once for each `take`; nothing if it has been given up meanwhile."""
        with self._changed:
            if self._owner == who:
                self._depth -= 1
                if self._depth <= 0:
                    self._free()

    def hand_over(self, who: Any, to: Any, *, is_once: bool = False) -> bool:
        """`to` has it from now on, taken once, in place of `who`. False where `who` has
        it not, or, with `is_once`, has taken it more often than once."""
        with self._changed:
            if self._owner != who or (is_once and self._depth > 1):
                return False
            self._owner, self._depth = to, 1
            return True

    def give_up(self, who: Any) -> None:
        """However often `who` took it."""
        with self._changed:
            if self._owner == who:
                self._free()

    def _free(self) -> None:
        self._owner, self._depth = None, 0
        self._changed.notify_all()

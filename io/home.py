"""Detects that an object is used in a forked process.

A fork has a copy of the parent's memory, but none of its threads. Its files and locks
still belong to the parent.
"""

import os
from collections.abc import Callable
from weakref import WeakMethod, WeakSet

from .errors import PenstockError


class Home:
    """Remembers the process that created it.

    `when_left` is a bound method, whose object is not kept alive. It is called in each
    child process that is forked later, before any other code. It must not raise.
    """

    def __init__(self, when_left: Callable[[], None] | None = None) -> None:
        self.is_here = True
        """Whether this is still that process, and not a fork of it."""
        self._when_left = None if when_left is None else WeakMethod(when_left)
        self._pid = os.getpid()
        _HOMES.add(self)

    def check(self, what: str = "this model") -> None:
        """Raises PenstockError in a forked process; `what` names the object."""
        if not self.is_here:
            raise PenstockError(
                f"{what} belongs to process {self._pid}, and its threads do not live "
                f"on in a fork of it: load it in process {os.getpid()} itself, or "
                "start that with the method 'spawn' (multiprocessing_context='spawn' "
                "of a DataLoader)"
            )

    def leave(self) -> None:
        """Called in the child process, once after each fork."""
        self.is_here = False
        when_left = None if self._when_left is None else self._when_left()
        if when_left is not None:
            when_left()


_HOMES: WeakSet[Home] = WeakSet()


def _leave_all() -> None:
    for home in list(_HOMES):
        home.leave()


# Registered once: a registration cannot be undone.
os.register_at_fork(after_in_child=_leave_all)

"""Detects that an object is used in a forked process.

A fork has a copy of the parent's memory, but none of its threads. Its files and locks
still belong to the parent.
"""

import os
from collections.abc import Callable
from weakref import WeakMethod, WeakSet

from .errors import PenstockError


class ForkGuard:
    """Remembers the process that created it.

    `in_child` is a bound method, whose object is not kept alive. It is called in each
    child process that is forked later, before any other code. It must not raise.
    """

    def __init__(self, in_child: Callable[[], None] | None = None) -> None:
        self.is_forked = False
        """Whether this process is a fork of the one that created it."""
        self._in_child = None if in_child is None else WeakMethod(in_child)
        self._pid = os.getpid()
        _GUARDS.add(self)

    def check(self, what: str = "this model") -> None:
        """Raises PenstockError in a forked process; `what` names the object."""
        if self.is_forked:
            raise PenstockError(
                f"{what} belongs to process {self._pid}, and its threads do not live "
                f"on in a fork of it: load it in process {os.getpid()} itself, or "
                "start that with the method 'spawn' (multiprocessing_context='spawn' "
                "of a DataLoader)"
            )

    def leave(self) -> None:
        """Called in the child process, once after each fork."""
        self.is_forked = True
        in_child = None if self._in_child is None else self._in_child()
        if in_child is not None:
            in_child()


_GUARDS: WeakSet[ForkGuard] = WeakSet()


def _leave_all() -> None:
    for guard in list(_GUARDS):
        guard.leave()


# Registered once: a registration cannot be undone.
os.register_at_fork(after_in_child=_leave_all)

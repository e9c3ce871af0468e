"""The process that something was made in. A fork has a copy of its memory, but none of
its threads, and files and locks that are still its parent's."""

import os
from collections.abc import Callable
from weakref import WeakMethod, WeakSet

from .errors import PenstockError


class Home:
    """Remembers the process that it was made in. `when_left`, a method of what this
    does not keep alive, is called in each child that is forked later, before any code
    of the child's own. It must not raise."""

    def __init__(self, when_left: Callable[[], None] | None = None) -> None:
        self.is_here = True
        """Whether the caller is in that process."""
        self._when_left = None if when_left is None else WeakMethod(when_left)
        self._pid = os.getpid()
        _HOMES.add(self)

    def check(self, what: str = "this model") -> None:
        """Raises PenstockError in a child that was forked."""
        if not self.is_here:
            raise PenstockError(
                f"{what} belongs to process {self._pid}, and its threads do not live "
                f"on in a fork of it: load it in process {os.getpid()} itself, or "
                "start that with the method 'spawn' (multiprocessing_context='spawn' "
                "of a DataLoader)"
            )

    def leave(self) -> None:
        """Called in the child, once for each fork on the way to it."""
        self.is_here = False
        when_left = None if self._when_left is None else self._when_left()
        if when_left is not None:
            when_left()


_HOMES: WeakSet[Home] = WeakSet()


def _leave_all() -> None:
    for home in list(_HOMES):
        home.leave()


# Once for all: what is registered can never be taken back.
os.register_at_fork(after_in_child=_leave_all)

"""The thread that a sweep runs in: greenlets can be switched in no other."""

import contextlib
from collections.abc import Callable, Iterator

from ...io.errors import ClosedError
from .endings import Ended, Endings

_WORK = "its thread"


class Owner:
    """Of `work`, which the calling thread begins. Another thread can only `leave` the
    work to it, between two pieces: it is to be ended then, and never gone on with."""

    def __init__(self, work: Ended) -> None:
        self._work = work
        # Not the thread's number, which others get when it has ended.
        self._endings = Endings.here()
        self._endings.started.add(work)
        # By one step of the interpreter each: an interrupt could keep a lock locked.
        # Whoever leaves the work claims it under a name that is nobody else's.
        self._claim: dict[str, object] = {}

    @property
    def is_here(self) -> bool:
        """Whether the caller's thread is the one."""
        return self._endings is Endings.here()

    @property
    def is_idle_here(self) -> bool:
        """Whether it is, and in no piece of the work."""
        return self.is_here and self._claim.get("by") != _WORK

    @contextlib.contextmanager
    def at_work(self, *, ends: bool = False) -> Iterator[None]:
        """A piece of the work: a next one, or that which `ends` it. Raises ClosedError
        where another thread has left no next one."""
        if self._claim.setdefault("by", _WORK) != _WORK and not ends:
            raise ClosedError("this sweep was closed by another thread")
        try:
            yield
        finally:
            if self._claim.get("by") == _WORK:
                self._claim.clear()

    def leave(self, *, may_leave: Callable[[], bool]) -> bool:
        """Called by another thread. False while a piece of the work is under way, or
        where something else of that thread stands in the way."""
        mine = object()
        if self._claim.setdefault("by", mine) is not mine:
            return False
        if may_leave():
            return True
        self._claim.clear()
        return False

    def end_later(self) -> None:
        """What was left is kept until its thread comes by, or ends."""
        self._endings.left.append(self._work)

    def has_ended(self) -> None:
        """Nothing of the work is suspended any more."""
        self._endings.started.discard(self._work)
        with contextlib.suppress(ValueError):
            self._endings.left.remove(self._work)

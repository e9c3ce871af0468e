"""The thread that a sweep runs in: greenlets can be switched in no other."""

import contextlib
import threading
from collections.abc import Callable, Iterator

from ..io.errors import ClosedError
from .endings import Ended, Endings


class Owner:
    """Of `work`, which the calling thread begins. Another thread can only `leave` the
    work to it, between two pieces: it is to be ended then, and never gone on with."""

    def __init__(self, work: Ended) -> None:
        self._work = work
        # Not the thread's number, which others get when it has ended.
        self._endings = Endings.here()
        self._endings.started.add(work)
        self._lock = threading.Lock()
        self._is_at_work = False
        self._is_left = False

    @property
    def is_here(self) -> bool:
        """Whether the caller's thread is the one."""
        return self._endings is Endings.here()

    @property
    def is_idle_here(self) -> bool:
        """Whether it is, and in no piece of the work."""
        return self.is_here and not self._is_at_work

    @contextlib.contextmanager
    def at_work(self, *, ends: bool = False) -> Iterator[None]:
        """A piece of the work: a next one, or that which `ends` it. Raises ClosedError
        where another thread has left no next one."""
        with self._lock:
            if self._is_left and not ends:
                raise ClosedError("this sweep was closed by another thread")
            self._is_at_work = True
        try:
            yield
        finally:
            self._is_at_work = False

    def leave(self, *, may_leave: Callable[[], bool]) -> bool:
        """Called by another thread. False while a piece of the work is under way, or
        where something else of that thread stands in the way."""
        with self._lock:
            if self._is_at_work or self._is_left or not may_leave():
                return False
            self._is_left = True
            return True

    def end_later(self) -> None:
        """What was left is kept until its thread comes by, or ends."""
        self._endings.left.append(self._work)

    def has_ended(self) -> None:
        """Nothing of the work is suspended any more."""
        self._endings.started.discard(self._work)
        with contextlib.suppress(ValueError):
            self._endings.left.remove(self._work)

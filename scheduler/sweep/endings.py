"""Ends suspended work when its thread ends: a greenlet can only run in the thread that
started it."""

import atexit
import sys
import threading
from typing import Protocol
from weakref import WeakSet

from ...io.fork_guard import ForkGuard


class ThreadBound(Protocol):
    """Work that can only run in one thread."""

    def end_with_thread(self) -> None:
        """Ends the work. Called by its thread, which is about to end; never raises."""
        ...


class Endings:
    """The work of one thread that has to end with it. The thread creates this by
    `here`."""

    def __init__(self) -> None:
        self._fork_guard = ForkGuard()
        self.started: WeakSet[ThreadBound] = WeakSet()
        """Work that this thread began. It may be garbage collected before."""
        self.left: list[ThreadBound] = []
        """Work that another thread closed but could not end. The reference keeps it
        alive: a greenlet that is dropped runs its `finally` blocks at once, wherever
        the program is then."""

    @staticmethod
    def here() -> "Endings":
        """Returns the object of the calling thread."""
        guard = getattr(_local, "guard", None)
        if guard is None:
            guard = _local.guard = _Guard()
        return guard.endings

    def end_all(self) -> None:
        if self._fork_guard.is_forked:  # the work belongs to the parent process
            return
        for work in {*self.started, *self.left}:
            work.end_with_thread()
        self.left.clear()


class _Guard:
    """Is deleted by its thread when that ends, as all thread-local values are."""

    def __init__(self) -> None:
        self.endings = Endings()
        if threading.get_ident() == threading.main_thread().ident:
            atexit.register(self.endings.end_all)  # modules are still loaded then

    def __del__(self) -> None:
        if not sys.is_finalizing():
            self.endings.end_all()


_local = threading.local()

"""What a thread has to end before it ends itself: greenlets run in no other."""

import atexit
import sys
import threading
from typing import Protocol
from weakref import WeakSet

from ...io.home import Home


class Ended(Protocol):
    """What runs in one thread alone."""

    def end_with_thread(self) -> None:
        """Called by that thread, which is about to end. Must not raise."""
        ...


class Endings:
    """Of one thread, which made it by `here`."""

    def __init__(self) -> None:
        self._home = Home()
        self.started: WeakSet[Ended] = WeakSet()
        """What this thread began. It may well be dropped before."""
        self.left: list[Ended] = []
        """What another thread had to leave as it was: kept for this one to end, since
        all that runs on when it is dropped would run in the middle of anything."""

    @staticmethod
    def here() -> "Endings":
        """Those of the caller's thread."""
        guard = getattr(_local, "guard", None)
        if guard is None:
            guard = _local.guard = _Guard()
        return guard.endings

    def end_all(self) -> None:
        if not self._home.is_here:  # a fork of that thread: the work is its parent's
            return
        for ended in {*self.started, *self.left}:
            ended.end_with_thread()
        self.left.clear()


class _Guard:
    """Dies with its thread, in it: what is local to a thread is dropped by it."""

    def __init__(self) -> None:
        self.endings = Endings()
        if threading.get_ident() == threading.main_thread().ident:
            atexit.register(self.endings.end_all)  # while all that it needs is there

    def __del__(self) -> None:
        if not sys.is_finalizing():
            self.endings.end_all()


_local = threading.local()

"""The thread that a sweep runs in. Its greenlets can be switched in no other thread."""

import contextlib
from collections.abc import Callable, Iterator

from ...io.errors import ClosedError
from .endings import Endings, ThreadBound

_OWN_THREAD = "its own thread"


class Owner:
    """Ties `work` to the calling thread, which begins it. Another thread can only
    `leave` the work, between two pieces of it; its own thread must end it then, and
    cannot continue it."""

    def __init__(self, work: ThreadBound) -> None:
        self._work = work
        # A thread's number would not do: it is used again once the thread has ended.
        self._endings = Endings.here()
        self._endings.started.add(work)
        # Claimed by `dict.setdefault`, which is atomic. An interrupt could leave a real
        # lock locked for ever. The value "by" says who is at work; None: nobody.
        self._claim: dict[str, object] = {}

    @property
    def is_here(self) -> bool:
        """Whether the caller runs in the owning thread."""
        return self._endings is Endings.here()

    @property
    def is_idle_here(self) -> bool:
        """Whether the caller is in the owning thread, and in no piece of the work."""
        return self.is_here and self._claim.get("by") != _OWN_THREAD

    @contextlib.contextmanager
    def at_work(self, *, ends: bool = False) -> Iterator[None]:
        """Runs one piece of the work, or, with `ends`, the piece that ends it. Raises
        ClosedError if another thread has left the work; it may only be ended then."""
        if self._claim.setdefault("by", _OWN_THREAD) != _OWN_THREAD and not ends:
            raise ClosedError("this sweep was closed by another thread")
        try:
            yield
        finally:
            if self._claim.get("by") == _OWN_THREAD:
                self._claim.clear()

    def leave(self, *, may_leave: Callable[[], bool]) -> bool:
        """Called by another thread: no further piece may begin. Returns False, and
        changes nothing, while a piece is under way or if `may_leave` says no."""
        mine = object()
        if self._claim.setdefault("by", mine) is not mine:
            return False
        if may_leave():
            return True
        self._claim.clear()
        return False

    def end_later(self) -> None:
        """Keeps the work, which was left, until its thread ends it."""
        self._endings.left.append(self._work)

    def has_ended(self) -> None:
        """Forgets the work, of which nothing is suspended any more."""
        self._endings.started.discard(self._work)
        with contextlib.suppress(ValueError):
            self._endings.left.remove(self._work)

"""A streamed model's threads, files and memory end with it, wherever it is dropped."""

import _thread
import contextlib
import threading
import weakref
from collections.abc import Callable, Sequence
from typing import Any

from ...io.home import Home

_MAX_SECONDS = 5.0
"""That a dropped model is waited for. Reads under way take less; what takes longer, or
waits for a lock of whoever made the garbage collector run, goes on by itself."""


class Life:
    """Calls all of `closers`, in this order, when `model` is garbage, unless `detach`
    comes first. None of them may refer to the model, which would then never be."""

    def __init__(
        self, model: Any, closers: Sequence[Callable[[], None]], home: Home
    ) -> None:
        self._finaliser = weakref.finalize(model, _end, tuple(closers), home)
        # Threads end with the process, and files see to themselves.
        self._finaliser.atexit = False

    def __repr__(self) -> str:
        return f"<Life: {'going on' if self._finaliser.alive else 'over'}>"

    def detach(self) -> None:
        """The model is closed by its owner."""
        self._finaliser.detach()


def _end(closers: tuple[Callable[[], None], ...], home: Home) -> None:
    """Called by the garbage collector: on any thread, one of those that are to end
    included, in the middle of anything. So others close, in a thread of their own."""
    if not home.is_here:
        return
    has_begun = _thread.allocate_lock()
    has_begun.acquire()
    closing = threading.Thread(
        target=_close, args=(closers,), name="penstock-close", daemon=True
    )

    def begin() -> None:
        closing.start()
        has_begun.release()

    # `start` waits for the new thread, which waits for a lock of `threading` that the
    # collector's caller may have: so not even that is done here.
    try:
        _thread.start_new_thread(begin, ())
    except RuntimeError:  # the interpreter is about to end
        return
    if not _is_ours() and has_begun.acquire(timeout=_MAX_SECONDS):
        closing.join(_MAX_SECONDS)


def _close(closers: tuple[Callable[[], None], ...]) -> None:
    for close in closers:
        with contextlib.suppress(Exception):  # nobody is there to be told
            close()


def _is_ours() -> bool:
    """Whether the caller is one of the threads that may have to end."""
    here = threading.get_ident()
    return any(
        thread.ident == here and thread.name.startswith("penstock-")
        for thread in threading.enumerate()
    )

"""Closes a streamed model's threads, files and memory when it is garbage collected."""

import _thread
import contextlib
import threading
import weakref
from collections.abc import Callable, Sequence
from typing import Any

from ...io.fork_guard import ForkGuard

_MAX_SECONDS = 5.0
"""How long garbage collection waits until a dropped model is closed. Reads under way
take less. Closing may take longer if it waits for a lock of the collecting thread; then
it goes on in the background."""


class Life:
    """Calls all `closers`, in this order, when `model` is garbage collected, unless
    `detach` is called before. No closer may refer to the model: it would keep the model
    alive."""

    def __init__(
        self, model: Any, closers: Sequence[Callable[[], None]], fork_guard: ForkGuard
    ) -> None:
        self._finaliser = weakref.finalize(model, _end, tuple(closers), fork_guard)
        # Threads end with the process, and files see to themselves.
        self._finaliser.atexit = False

    def __repr__(self) -> str:
        return f"<Life: {'going on' if self._finaliser.alive else 'over'}>"

    def detach(self) -> None:
        """Cancels the calls: the model was closed by its owner."""
        self._finaliser.detach()


def _end(closers: tuple[Callable[[], None], ...], fork_guard: ForkGuard) -> None:
    """Runs `closers` in a new thread. The garbage collector calls this in any thread,
    even one that a closer joins, and at any point of the program."""
    if fork_guard.is_forked:
        return
    has_begun = _thread.allocate_lock()
    has_begun.acquire()
    closing = threading.Thread(
        target=_close, args=(closers,), name="penstock-close", daemon=True
    )

    def begin() -> None:
        closing.start()
        has_begun.release()

    # `closing.start` waits for the new thread, which takes a lock of `threading` that
    # the interrupted code may hold. So another thread calls it.
    try:
        _thread.start_new_thread(begin, ())
    except RuntimeError:  # the interpreter is about to end
        return
    if not _is_ours() and has_begun.acquire(timeout=_MAX_SECONDS):
        closing.join(_MAX_SECONDS)


def _close(closers: tuple[Callable[[], None], ...]) -> None:
    for close in closers:
        with contextlib.suppress(Exception):  # there is no caller to raise it to
            close()


def _is_ours() -> bool:
    """Whether the caller is a thread of this library, which a closer may join."""
    here = threading.get_ident()
    return any(
        thread.ident == here and thread.name.startswith("penstock-")
        for thread in threading.enumerate()
    )

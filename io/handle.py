"""A handle to wait for work that other threads do."""

import contextlib
import inspect
import threading
import traceback
from collections.abc import Callable, Iterator

_SUSPENDS = inspect.CO_COROUTINE | inspect.CO_GENERATOR | inspect.CO_ASYNC_GENERATOR


class Handle:
    """Counts the parts of some work down; `wait` returns when all are done.

    Any thread may call `done` when it has finished a part. Any thread may call `wait`,
    also repeatedly. If a part failed, each `wait` raises the first error.
    """

    def __init__(self, parts: int) -> None:
        self._lock = threading.Lock()
        self._left = parts
        self._finished = threading.Event()
        self._error: BaseException | None = None
        self._then: list[Callable[[], None]] = []
        if parts == 0:
            self._finished.set()

    def done(self, error: BaseException | None = None) -> None:
        """Reports that one part is finished, with `error` if it failed."""
        with self._lock:
            self._left -= 1
            if error is not None and self._error is None:
                self._error = error
            is_last = self._left == 0
        if is_last:
            # Before any waiting thread goes on, since it may close what these use.
            for then in self._then:
                then()
            self._finished.set()

    def when_done(self, then: Callable[[], None]) -> None:
        """Calls `then` once all parts are finished; it must not raise.

        It is called on the thread of the last part, after earlier callbacks; or at
        once, if all parts are finished already.
        """
        with self._lock:
            is_done = self._left == 0
            if not is_done:
                self._then.append(then)
        if is_done:
            then()

    @property
    def is_done(self) -> bool:
        """Whether all parts are finished, with or without errors."""
        return self._finished.is_set()

    def wait(self) -> None:
        """Blocks until all parts are finished; raises the first error of a part."""
        self._finished.wait()
        if self._error is not None:
            raise self._error

    def wait_quietly(self) -> None:
        """Blocks until all parts are finished, and ignores errors."""
        self._finished.wait()


def forget_frames(error: BaseException) -> None:
    """Clears the frames of `error` and its causes.

    Otherwise the error would keep the local variables of these frames alive. Among them
    may be views of a mapping, which is freed only after its last view.
    """
    for cause in _with_causes(error):
        for frame, _ in traceback.walk_tb(cause.__traceback__):
            # Not those of coroutines: clearing a suspended frame would end it.
            if not frame.f_code.co_flags & _SUSPENDS:
                with contextlib.suppress(RuntimeError):  # the frame is running
                    frame.clear()


def forget_traceback(error: BaseException) -> None:
    """Removes the traceback of `error` and its causes, and notes where it was raised.

    For callers whose own running frames hold memory: `forget_frames` cannot clear them.
    """
    if error.__traceback__ is not None:
        place = traceback.extract_tb(error.__traceback__)[-1]
        error.add_note(f"raised in {place.name} ({place.filename}:{place.lineno})")
    for cause in list(_with_causes(error)):
        cause.__traceback__ = None


def _with_causes(error: BaseException) -> Iterator[BaseException]:
    """Yields `error` and all errors that led to it, each once."""
    current: BaseException | None = error
    seen: set[int] = set()
    while current is not None and id(current) not in seen:
        seen.add(id(current))
        yield current
        current = current.__cause__ or current.__context__

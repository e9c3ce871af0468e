"""The completion of work that other threads do: wait for it, once it is needed."""

import contextlib
import inspect
import threading
import traceback
from collections.abc import Callable, Iterator

_SUSPENDS = inspect.CO_COROUTINE | inspect.CO_GENERATOR | inspect.CO_ASYNC_GENERATOR


class Handle:
    """Counts parts down; `wait` returns when all are done and raises what failed.

    Parts finish on any thread (`done`); `wait` may be called by any thread, again and
    again, and raises the same first error each time.
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
        """One part is finished, with or without an error."""
        with self._lock:
            self._left -= 1
            if error is not None and self._error is None:
                self._error = error
            is_last = self._left == 0
        if is_last:
            # Before anybody goes on, who may close what it writes to.
            for then in self._then:
                then()
            self._finished.set()

    def when_done(self, then: Callable[[], None]) -> None:
        """Calls `then`, which must not raise, once all parts are finished: on the
        thread of the last one, after those given before, or at once."""
        with self._lock:
            is_done = self._left == 0
            if not is_done:
                self._then.append(then)
        if is_done:
            then()

    @property
    def is_done(self) -> bool:
        return self._finished.is_set()

    def wait(self) -> None:
        self._finished.wait()
        if self._error is not None:
            raise self._error

    def wait_quietly(self) -> None:
        """Waits until nobody writes any more; an error is no concern of the caller."""
        self._finished.wait()


def forget_frames(error: BaseException) -> None:
    """Whoever keeps `error`, or what caused it, must not keep the memory that the
    functions it came through had in hand: a mapping lives as long as its views."""
    for found in _with_causes(error):
        for frame, _ in traceback.walk_tb(found.__traceback__):
            # A coroutine that waits has more to do: clearing its frame would end it.
            if not frame.f_code.co_flags & _SUSPENDS:
                with contextlib.suppress(RuntimeError):  # it runs just now
                    frame.clear()


def forget_way(error: BaseException) -> None:
    """Nor even the frames, where those that called them and go on have memory in hand.
    Where `error` was raised is told in a note."""
    if error.__traceback__ is not None:
        place = traceback.extract_tb(error.__traceback__)[-1]
        error.add_note(f"raised in {place.name} ({place.filename}:{place.lineno})")
    for found in list(_with_causes(error)):
        found.__traceback__ = None


def _with_causes(error: BaseException) -> Iterator[BaseException]:
    """`error` and what it came from, each once."""
    found: BaseException | None = error
    seen: set[int] = set()
    while found is not None and id(found) not in seen:
        seen.add(id(found))
        yield found
        found = found.__cause__ or found.__context__

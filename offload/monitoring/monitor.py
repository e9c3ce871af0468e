"""Samples a job a few times per second, and passes the samples to listeners."""

import threading
from collections import deque
from collections.abc import Callable, Sequence

from ...io.closing import Closing
from ...io.fallbacks import Fallbacks
from .samples import ResourceSample, Window

_WINDOW_SECONDS = 5.0

Listener = Callable[[Window], None]


class Every:
    """A listener that calls `listener` once in `seconds`.

    If it is eager, it is called at once for the first time, and also at the end.
    """

    def __init__(
        self, seconds: float, listener: Listener, *, is_eager: bool = False
    ) -> None:
        self._seconds = seconds
        self._listener = listener
        self._is_eager = is_eager
        self._next = 0.0 if is_eager else seconds

    def __call__(self, window: Window) -> None:
        if window.now.seconds >= self._next:
            self._next = window.now.seconds + self._seconds
            self._listener(window)

    def finish(self, window: Window) -> None:
        """Calls an eager listener for the last time."""
        if self._is_eager:
            self._listener(window)


def interval_seconds(seconds: float) -> float:
    """Seconds until the next sample, `seconds` after the job began.

    A sample takes half a millisecond, 1/500 of the shortest interval. In longer jobs,
    nobody needs to see every quarter of a second.
    """
    return min(max(seconds / 240, 0.25), 1.0)


class Monitor(Closing):
    """Calls `look` in a thread, from `start` to `close`, and passes what it returns to
    each listener; once more at the end.

    A listener that raises an error is announced and called no more: a job must not end
    because it cannot be shown.
    """

    def __init__(
        self,
        look: Callable[[], ResourceSample],
        listeners: Sequence[Listener],
        *,
        interval: Callable[[float], float] = interval_seconds,
    ) -> None:
        self._look = look
        self._listeners = list(listeners)
        self.failures = Fallbacks()
        self._interval = interval
        self._recent: deque[ResourceSample] = deque()
        self._is_over = threading.Event()
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        self._thread = threading.Thread(
            target=self._work, name="penstock-monitor", daemon=True
        )
        self._thread.start()

    def tick(self) -> None:
        """Takes one sample, and raises what a listener raises."""
        window = self._see()
        for listener in self._listeners:
            listener(window)

    def close(self) -> None:
        if self._thread is not None:
            self._is_over.set()
            self._thread.join()
            self._thread = None
            self._tell(is_last=True)

    def _work(self) -> None:
        while not self._is_over.wait(self._interval(self._seconds)):
            self._tell()

    @property
    def _seconds(self) -> float:
        """The time of the last sample, in seconds since the job began."""
        return self._recent[-1].seconds if self._recent else 0.0

    def _tell(self, *, is_last: bool = False) -> None:
        try:
            window = self._see()
        except Exception as error:
            self._is_over.set()
            self._announce(error)
            return
        for listener in list(self._listeners):
            try:
                if is_last and isinstance(listener, Every):
                    listener.finish(window)
                else:
                    listener(window)
            except Exception as error:
                self._listeners.remove(listener)
                self._announce(error)

    def _announce(self, error: Exception) -> None:
        self.failures.announce(f"the progress of this job is no longer shown: {error}")

    def _see(self) -> Window:
        now = self._look()
        recent = self._recent
        while recent and (
            recent[0].stage != now.stage
            or now.seconds - recent[0].seconds > _WINDOW_SECONDS
        ):
            recent.popleft()
        recent.append(now)
        return Window(recent[0], now)

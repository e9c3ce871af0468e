"""Looks at a job a few times a second and tells those who show, write or keep it."""

import logging
import threading
from collections import deque
from collections.abc import Callable, Sequence

from ...io.closing import Closing
from .samples import ResourceSample, Window

_log = logging.getLogger("penstock")
_WINDOW_SECONDS = 5.0

Listener = Callable[[Window], None]


class Every:
    """Tells `listener` once in `seconds`; the first time at once, if it is `eager`,
    which is then told of the end, too."""

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
        """The last there is to tell."""
        if self._is_eager:
            self._listener(window)


def interval_seconds(seconds: float) -> float:
    """Until the next look, `seconds` after the beginning: a look takes half a
    millisecond, which is a five hundredth of a quarter of a second, but nobody who
    waits for minutes needs to see every quarter of one."""
    return min(max(seconds / 240, 0.25), 1.0)


class Monitor(Closing):
    """Calls `look` in a thread of its own, `start` to `close`, and tells each listener
    what it saw; once more at the end.

    A listener that fails is announced and told no more: a job must not end because it
    cannot be shown.
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
        self.failures: list[str] = []
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
        """Looks once, and raises what a listener raises."""
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
        """Since the beginning, when it last looked."""
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
        failure = f"how the job goes is no longer told: {error}"
        self.failures.append(failure)
        _log.warning(failure)

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

"""Makes a process start sooner. Each function does so for the time of a `with`."""

import gc
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

UNUSED = ("scipy", "sklearn")
"""Libraries that transformers imports if they are installed, for object detection and
assisted generation. No command uses them. scikit-learn also imports pandas and
pyarrow."""

_RARELY = (100_000, 50, 100)


class _Thresholds:
    """The collector's thresholds, which all threads share. They are as before once the
    last of those that changed them has ended."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._num = 0
        self._usual = _RARELY

    def begin(self) -> None:
        with self._lock:
            if not self._num:
                self._usual = gc.get_threshold()
                gc.set_threshold(*_RARELY)
            self._num += 1

    def end(self) -> None:
        with self._lock:
            self._num -= 1
            if not self._num:
                gc.set_threshold(*self._usual)


_THRESHOLDS = _Thresholds()


@contextmanager
def hidden(names: Sequence[str] = UNUSED) -> Iterator[None]:
    """Makes libraries that are not imported yet seem not installed.

    For a process that runs only Penstock, as a command does. Does nothing if
    transformers is imported already: it remembers what is installed and may import it
    later.
    """
    is_late = "transformers" in sys.modules
    absent = [name for name in names if name not in sys.modules and not is_late]
    for name in absent:
        sys.modules[name] = None  # type: ignore[assignment]  # import fails then
    try:
        yield
    finally:
        for name in absent:
            sys.modules.pop(name, None)


@contextmanager
def rare_collections() -> Iterator[None]:
    """Makes garbage collections rare.

    The objects that an import or a plan makes stay, and collections look through them
    all repeatedly, which takes a large part of importing transformers.
    """
    _THRESHOLDS.begin()
    try:
        yield
    finally:
        _THRESHOLDS.end()

"""The frames that threads stand in."""

import gc
import sys
import threading
from types import FrameType

# Whether garbage is collected is one switch for all threads.
_LOCK = threading.RLock()


def current_frames() -> dict[int, FrameType]:
    """The innermost frame of each thread, by the thread's number: its caller's, where
    that is the thread that asks.

    Until CPython 3.11.9, a garbage collection inside of `sys._current_frames` may stop
    the interpreter for good (github.com/python/cpython/issues/106883): none begins.
    """
    with _LOCK:
        was_enabled = gc.isenabled()
        gc.disable()
        try:
            frames = sys._current_frames()
        finally:
            if was_enabled:
                gc.enable()
    frames[threading.get_ident()] = sys._getframe(1)  # this one is about to end
    return frames

"""The frames that threads stand in."""

import gc
import sys
import threading
from types import FrameType
from typing import Literal

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


def wait_of(thread: int, *, not_in: str) -> Literal["caller", "lock", None]:
    """What the thread with this number waits for: the end of the caller's thread, or a
    lock of some other kind, which the code in the file `not_in` does not count as."""
    frame = current_frames().get(thread)
    is_in_lock = False
    while frame is not None and frame.f_code.co_filename == threading.__file__:
        if frame.f_locals.get("self") is threading.current_thread():
            return "caller"
        is_in_lock, frame = True, frame.f_back
    is_there = frame is not None and frame.f_code.co_filename == not_in
    return "lock" if is_in_lock and not is_there else None

"""The Python frames of running threads."""

import gc
import sys
import threading
from types import FrameType
from typing import Literal

# The garbage collector is switched off and on for all threads at once.
_LOCK = threading.RLock()


def current_frames() -> dict[int, FrameType]:
    """The innermost frame of each thread, by thread number. For the calling thread it
    is the caller's frame.

    Until CPython 3.11.9, a garbage collection inside `sys._current_frames` may deadlock
    (github.com/python/cpython/issues/106883). So it is switched off meanwhile.
    """
    with _LOCK:
        was_enabled = gc.isenabled()
        gc.disable()
        try:
            frames = sys._current_frames()
        finally:
            if was_enabled:
                gc.enable()
    frames[threading.get_ident()] = sys._getframe(1)  # this function's own is over
    return frames


def wait_of(thread: int, *, not_in: str) -> Literal["caller", "lock", None]:
    """What the thread with this number waits for: "caller", if it joins the calling
    thread; "lock", for any other wait of `threading`, except one that is called from
    the file `not_in`; else None."""
    frame = current_frames().get(thread)
    is_in_lock = False
    while frame is not None and frame.f_code.co_filename == threading.__file__:
        if frame.f_locals.get("self") is threading.current_thread():
            return "caller"
        is_in_lock, frame = True, frame.f_back
    is_there = frame is not None and frame.f_code.co_filename == not_in
    return "lock" if is_in_lock and not is_there else None

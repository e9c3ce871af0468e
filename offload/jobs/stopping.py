"""Stops a job on a signal, after the parts under way, and says how to go on."""

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType
from typing import Any, Self

from ...io.errors import StoppedError
from ..files.parts import OutputPart
from .ahead import Ahead
from .running import Output

_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_STDERR = 2
_STOPPING = b"penstock: finishing what is under way; once more: stop at once\n"


class Stopping:
    """While open, the first SIGINT or SIGTERM calls `stop` (in the signal handler, on
    the main thread) and the second raises KeyboardInterrupt. Afterwards signals are
    handled as before; a signal that was ignored stays ignored. Does nothing on another
    thread than the main one."""

    def __init__(self, stop: Callable[[], None]) -> None:
        self._stop = stop
        self._before: dict[signal.Signals, Any] = {}
        self.signal: int | None = None
        """The number of the first signal; None before one."""

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            for number in _SIGNALS:
                before = signal.getsignal(number)
                if before is not signal.SIG_IGN:  # as in a shell's background
                    # None: the handler was not set by Python and cannot be restored.
                    self._before[number] = signal.SIG_DFL if before is None else before
                    signal.signal(number, self._handle)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before.clear()

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.signal is not None:
            raise KeyboardInterrupt
        self.signal = number
        self._stop()


@contextmanager
def stopping(
    ahead: Ahead[OutputPart], output: Output, *, is_quiet: bool
) -> Iterator[None]:
    """The first signal ends the parts, the second ends the block. Raises StoppedError
    where parts are left."""

    def stop() -> None:
        ahead.stop()
        if not is_quiet:
            os.write(_STDERR, _STOPPING)  # safe in a signal handler

    with Stopping(stop) as stopped:
        try:
            yield
        except KeyboardInterrupt:
            raise _error(output, stopped) from None
    if stopped.signal is not None and not ahead.is_done:
        raise _error(output, stopped)


def _error(output: Output, stopped: Stopping) -> StoppedError:
    how = "run the same command again to go on"
    if not output.is_kept:
        how = "what went to standard output cannot be gone on with"
    return StoppedError(
        f"stopped: {output.num_rows:,} rows are done; {how}",
        stopped.signal or signal.SIGINT,
    )

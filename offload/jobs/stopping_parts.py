"""Stops a job after the parts under way, and says how to go on."""

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager

from ...io.errors import StoppedError
from ..files.parts import OutputPart
from .ahead import Ahead
from .running import Output
from .stopping import Stopping

_STDERR = 2
_STOPPING = b"penstock: finishing what is under way; once more: stop at once\n"


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

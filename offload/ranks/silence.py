"""Decides whether another rank that says nothing is lost, or only slow."""

import logging
import socket
import time
from contextlib import suppress

import psutil

SILENT_SECONDS = 4.0
"""After this long without a word, a rank counts as stopped."""
BUSY_SECONDS = 60.0
"""The same, while its process runs on this machine: others may take all cores."""

_log = logging.getLogger("penstock")
_STOPPED = (
    psutil.STATUS_STOPPED,
    psutil.STATUS_TRACING_STOP,
    psutil.STATUS_ZOMBIE,
    psutil.STATUS_DEAD,
)


class Silence:
    """How long the rank `peer`, at the other end of `there`, has said or taken
    nothing."""

    def __init__(self, peer: int, there: socket.socket) -> None:
        self._peer = peer
        self._there = there
        self._since = time.monotonic()
        self._is_said = False

    def is_over(self) -> None:
        """Called when it has said or taken something."""
        self._since = time.monotonic()

    def bear(self, error: TimeoutError) -> None:
        """Called when it is silent for the socket's timeout, with its `error`. Raises
        it if the rank counts as stopped."""
        silent = time.monotonic() - self._since
        if silent > BUSY_SECONDS or not _runs(self._there):
            raise error
        if not self._is_said:
            self._is_said = True
            _log.warning(
                "rank %d has said nothing for %.0f seconds, but its process runs: this "
                "machine is busy; waiting for at most %.0f seconds",
                self._peer,
                silent,
                BUSY_SECONDS,
            )


def _runs(there: socket.socket) -> bool:
    """Whether a process of this machine is at the other end, and is not stopped."""
    with suppress(OSError, psutil.Error):
        here, other = there.getsockname(), there.getpeername()
        for found in psutil.net_connections("tcp"):
            if (found.laddr, found.raddr) == (other[:2], here[:2]) and found.pid:
                return psutil.Process(found.pid).status() not in _STOPPED
    return False

"""Finds workers that somebody has stopped (SIGSTOP): nothing comes from them any more,
though their processes are there."""

import logging
from collections.abc import Collection
from contextlib import suppress

import psutil

LOOK_SECONDS = 1.0
"""How often processes are looked at."""
MOST_LOOKS = 10
"""After so many looks in a row at a stopped process, others do its work."""
_SAID_AT = 2

_log = logging.getLogger("penstock")


class StoppedWorkers:
    """Counts for each process how often in a row it was found stopped. Seconds would
    count, too, while this process is stopped itself, together with them."""

    def __init__(self) -> None:
        self._num_looks: dict[int, int] = {}

    def look(self, pids: Collection[int]) -> list[int]:
        """Those of the processes `pids` that have been stopped for too long. Called
        every `LOOK_SECONDS`."""
        before, self._num_looks = self._num_looks, {}
        for pid in filter(_is_stopped, pids):
            num = self._num_looks[pid] = before.get(pid, 0) + 1
            if num == _SAID_AT:
                left = (MOST_LOOKS - num) * LOOK_SECONDS
                _log.warning(
                    f"a worker (process {pid}) is stopped: if it does not go on within "
                    f"{left:.0f} seconds (kill -CONT {pid}), it is ended, and another "
                    "one does its work"
                )
        return [pid for pid, num in self._num_looks.items() if num >= MOST_LOOKS]


def _is_stopped(pid: int) -> bool:
    """A process that a debugger holds is not: it is waited for."""
    with suppress(psutil.Error):
        return bool(psutil.Process(pid).status() == psutil.STATUS_STOPPED)
    return False

"""A drive of a limited speed that several processes share, and a task that uses it
in each process where its model is loaded."""

from __future__ import annotations

import fcntl
import os
import struct
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from penstock.io.readers import threads
from penstock.io.readers.files import OpenFile
from penstock.offload.tasks.score_task import Score

_STATE = struct.Struct("<dQ")
"""When the drive is free again, in seconds of the clock that all processes share; and
the bytes that were read from it."""


@dataclass(frozen=True)
class PacedDrive:
    """All reads of the `threads` reader, in all processes that `install` it, one after
    the other at `bytes_per_second`. The file `state` says when the drive is free."""

    state: Path
    bytes_per_second: float

    def reset(self) -> None:
        self.state.write_bytes(_STATE.pack(0.0, 0))

    @property
    def num_bytes(self) -> int:
        """The bytes that were read since `reset`."""
        return int(_STATE.unpack(self.state.read_bytes())[1])

    def install(self) -> None:
        """From now on, this process reads from the drive."""
        threads._pread = self._pread

    def _pread(self, file: OpenFile, buffer: Any, offset: int) -> int:
        count = os.preadv(file.descriptor, [buffer], offset)
        end = self._end_of(count)
        time.sleep(max(0.0, end - time.monotonic()))
        return count

    def _end_of(self, nbytes: int) -> float:
        """When a read of `nbytes` that begins now ends."""
        with self.state.open("r+b", buffering=0) as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            free_at, num_bytes = _STATE.unpack(file.read(_STATE.size))
            end = max(time.monotonic(), free_at) + nbytes / self.bytes_per_second
            file.seek(0)
            file.write(_STATE.pack(end, num_bytes + nbytes))
        return float(end)


@dataclass(frozen=True)
class PacedScore(Score):
    """Scores, reading from `drive` in the processes that it is sent to."""

    drive: PacedDrive | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        return _installed, (self.drive,)


def _installed(drive: PacedDrive) -> PacedScore:
    drive.install()
    return PacedScore(drive=drive)

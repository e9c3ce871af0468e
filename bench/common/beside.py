"""Measures a machine while another process runs on it.

On a shared host, rates that were measured before or after a run may not apply to it. So
the process is stopped (SIGSTOP) every half a minute while a probe runs. The time of
these stops is subtracted from its clock. Reads that it had requested from the drive
still arrive meanwhile: a few MB each time.
"""

import signal
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

EVERY_SECONDS = 30.0


T = TypeVar("T")


@dataclass
class Beside(Generic[T]):
    """Runs probes while one process runs."""

    probe: Callable[[], T]
    samples: list[T] = field(default_factory=list)
    stops: list[tuple[float, float]] = field(default_factory=list)
    """(start, end) of each stop, in seconds of the clock that all processes share."""

    def communicate(self, process: subprocess.Popen[str]) -> tuple[str, str]:
        """Does the same as the method of `process`, with probes."""
        while True:
            try:
                return process.communicate(timeout=EVERY_SECONDS)
            except subprocess.TimeoutExpired:
                self._look(process)

    def correct(self, found: dict[str, Any]) -> None:
        """Subtracts the stops between `loaded_at` and the end from a worker's
        `seconds`, and corrects its rates."""
        start, seconds = found["loaded_at"], found["seconds"]
        spans = ((max(a, start), min(b, start + seconds)) for a, b in self.stops)
        found["stopped_seconds"] = sum(max(0.0, b - a) for a, b in spans)
        found["seconds"] -= found["stopped_seconds"]
        for rate in ("output_tokens_per_second", "tokens_per_second"):
            found[rate] *= seconds / found["seconds"]

    def _look(self, process: subprocess.Popen[str]) -> None:
        process.send_signal(signal.SIGSTOP)
        start = time.perf_counter()
        try:
            self.samples.append(self.probe())
        finally:
            self.stops.append((start, time.perf_counter()))
            process.send_signal(signal.SIGCONT)

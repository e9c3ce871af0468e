"""What a machine does in the very minutes in which a process runs, for hosts that are
shared: what was measured before and after may be true of neither.

The process stands still (SIGSTOP) while a probe runs, every half a minute, and its
clock without these stops is what counts. What the drive was asked for before arrives
meanwhile: a few MB each time.
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
    """Probes taken while one process runs."""

    probe: Callable[[], T]
    samples: list[T] = field(default_factory=list)
    stops: list[tuple[float, float]] = field(default_factory=list)
    """When each began and ended, by the clock that all processes share."""

    def communicate(self, process: subprocess.Popen[str]) -> tuple[str, str]:
        """As the method of `process`."""
        while True:
            try:
                return process.communicate(timeout=EVERY_SECONDS)
            except subprocess.TimeoutExpired:
                self._look(process)

    def correct(self, found: dict[str, Any]) -> None:
        """Takes the stops between `loaded_at` and its end out of a worker's `seconds`,
        and of its rates."""
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

"""What the parts of bench/gpu_suite.py share: their command line, a clock that waits
for the device, and figures that are written as they come.

A part that is killed at its time limit leaves what it had measured until then.
"""

import argparse
import importlib.util
import json
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

FAIL = "PENSTOCK_SUITE_FAIL"
"""Names the part that raises at once: for the suite's own test."""


WHOLE = ("greenlet", "platformdirs", "psutil", "pydantic", "yaml")
"""What penstock's own front door needs beside torch and transformers."""


def lacking(names: tuple[str, ...] = WHOLE) -> str | None:
    """Why what needs these packages is left out; None if they are all there."""
    missing = [name for name in names if importlib.util.find_spec(name) is None]
    return f"skipped: no {', '.join(missing)}" if missing else None


class Part:
    """One part's settings, and its figures by name."""

    def __init__(self, name: str) -> None:
        parser = argparse.ArgumentParser()
        parser.add_argument("--out", type=Path, required=True, help="JSON, figures")
        parser.add_argument("--kept", type=Path, required=True, help="files to keep")
        parser.add_argument("--work", type=Path, required=True, help="on the disk")
        parser.add_argument("--seconds", type=float, default=60.0)
        parser.add_argument("--dry-run", action="store_true")
        args = parser.parse_args()
        self._started = time.perf_counter()
        self._seconds: float = args.seconds
        self._path: Path = args.out
        self.kept: Path = args.kept
        self.work: Path = args.work
        self.is_dry: bool = args.dry_run
        self.has_cuda = torch.cuda.is_available() and not self.is_dry
        self.device = torch.device("cuda:0" if self.has_cuda else "cpu")
        self.figures: dict[str, Any] = {}
        if os.environ.get(FAIL) == name:
            raise RuntimeError(f"{name} was made to fail")

    @property
    def seconds_left(self) -> float:
        """Until the part is killed."""
        return self._seconds - (time.perf_counter() - self._started)

    def put(self, **figures: Any) -> None:
        """Keeps the figures, and writes all there are so far."""
        self.figures.update(figures)
        partial = self._path.with_suffix(".partial")
        partial.write_text(json.dumps(self.figures, indent=1))
        partial.replace(self._path)
        for name, value in figures.items():
            at = time.perf_counter() - self._started
            print(f"[{at:6.1f} s] {name}: {json.dumps(value)}", flush=True)

    def attempt(self, name: str, act: Callable[[], Any]) -> Any:
        """Keeps what `act` gives or, if it raises, what it raised: one figure that
        cannot be had must not cost those after it. None when it raised."""
        try:
            found = act()
        except Exception as error:
            self.put(**{name: {"error": f"{type(error).__name__}: {error}"[:600]}})
            return None
        self.put(**{name: found})
        return found

    def synchronize(self) -> None:
        if self.has_cuda:
            torch.cuda.synchronize(self.device)

    def seconds_of(self, act: Callable[[], object], rounds: int = 3) -> float:
        """Median seconds of `act` with all its work on the device, after one to warm
        up."""
        act()
        self.synchronize()
        found = []
        for _ in range(rounds):
            start = time.perf_counter()
            act()
            self.synchronize()
            found.append(time.perf_counter() - start)
        return statistics.median(found)

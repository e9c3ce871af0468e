"""What the parts of bench/gpu_suite.py share: their command line, their device, clocks
that wait for it, and figures that are written as they are measured.

A part that is killed at its time limit leaves what it has measured until then.
"""

import faulthandler
import gc
import importlib.util
import json
import os
import statistics
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from common import frame
from gpu.device import module_of, open_device, peer_of

FAIL = "PENSTOCK_SUITE_FAIL"
"""The environment variable that names a part that must fail, for the test of the
suite."""


WHOLE = ("greenlet", "platformdirs", "psutil", "pydantic", "yaml")
"""The packages that penstock's API needs in addition to torch and transformers."""


def lacking(names: tuple[str, ...] = WHOLE) -> str | None:
    """Why parts that need these packages are skipped; None if all are installed."""
    missing = [name for name in names if importlib.util.find_spec(name) is None]
    return f"skipped: no {', '.join(missing)}" if missing else None


class Part:
    """The settings of one part, its device, and its figures by name."""

    def __init__(self, name: str, text: str | None) -> None:
        parser = frame.parser(text)
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
        self.figures: dict[str, Any] = {}
        # Who hangs where, before the part is killed.
        faulthandler.dump_traceback_later(max(self._seconds - 2, 1))
        if os.environ.get(FAIL) == name:
            raise RuntimeError(f"{name} was made to fail")
        opened = open_device(is_dry=self.is_dry)
        self.device = opened.device
        self.has_gpu = self.device.type != "cpu"
        """Whether it is an accelerator, be it a simulated one."""
        self.has_cuda = self.device.type == "cuda"
        self.peer = peer_of(self.device)
        self.module: Any = module_of(self.device)
        self.put(device=opened.words)

    def number(self, real: int, dry: int) -> int:
        """How many of something there are: fewer in a dry run."""
        return dry if self.is_dry else real

    @property
    def seconds_left(self) -> float:
        """Seconds until the part is killed."""
        return self._seconds - (time.perf_counter() - self._started)

    def put(self, **figures: Any) -> None:
        """Adds the figures, and writes all that there are so far."""
        self.figures.update(figures)
        partial = self._path.with_suffix(".partial")
        partial.write_text(json.dumps(self.figures, indent=1))
        partial.replace(self._path)
        for name, value in figures.items():
            at = time.perf_counter() - self._started
            print(f"[{at:6.1f} s] {name}: {json.dumps(value)}", flush=True)

    def attempt(self, name: str, act: Callable[[], Any]) -> Any:
        """Adds the result of `act`, or its error, as the figure `name`.

        So a figure that cannot be measured does not prevent the later ones. Returns
        None after an error.
        """
        try:
            found = act()
        except Exception as error:
            traceback.print_exc()
            self.put(**{name: {"error": f"{type(error).__name__}: {error}"[:600]}})
            traceback.clear_frames(error.__traceback__)
            found = None
        else:
            self.put(**{name: found})
        return found

    def synchronize(self) -> None:
        if self.has_gpu:
            torch.accelerator.synchronize(self.device)

    def give_back(self) -> None:
        """Gives memory that no tensor uses back to the device, and counts its peak from
        now on."""
        gc.collect()
        if self.has_gpu:
            torch.accelerator.empty_cache()
            torch.accelerator.reset_peak_memory_stats(self.device)

    def peak_bytes(self) -> int | None:
        """The most bytes of the device that tensors took at one time, since
        `give_back`."""
        if not self.has_gpu:
            return None
        return int(torch.accelerator.max_memory_allocated(self.device))

    def seconds_of(self, act: Callable[[], object], rounds: int = 3) -> float:
        """The median seconds of `act`, including all its work on the device, after one
        run to warm up."""
        act()
        self.synchronize()
        found = []
        for _ in range(self.number(rounds, 1)):
            start = time.perf_counter()
            act()
            self.synchronize()
            found.append(time.perf_counter() - start)
        return statistics.median(found)

    def seconds_on(
        self, stream: torch.Stream, act: Callable[[], object], rounds: int = 3
    ) -> float:
        """The median seconds between the beginning and the end of what `act` does on
        `stream`, which is current meanwhile, by the device's own clock."""
        found = []
        for _ in range(1 + self.number(rounds, 1)):
            first, last = (
                torch.Event(stream.device, enable_timing=True) for _ in range(2)
            )
            first.record(stream)
            with stream:
                act()
            last.record(stream)
            last.synchronize()
            found.append(first.elapsed_time(last) / 1e3)
        return statistics.median(found[1:])

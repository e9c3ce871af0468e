"""How much memory there is and was used, by psutil and the kernel's own counters."""

import ctypes
import time
from pathlib import Path

import psutil

_STATUS = Path("/proc/self/status")


def available_bytes() -> int:
    """Memory this process can still take: the machine's, or its cgroup's if less."""
    free = int(psutil.virtual_memory().available)
    for limit_file, usage_file in (
        ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
        (
            "/sys/fs/cgroup/memory/memory.limit_in_bytes",
            "/sys/fs/cgroup/memory/memory.usage_in_bytes",
        ),
    ):
        limit, usage = _number(limit_file), _number(usage_file)
        if limit is not None and usage is not None:
            free = min(free, max(limit - usage, 0))
    return free


def peak_resident_bytes() -> int:
    """Most resident memory of this process so far (VmHWM), else what it has now."""
    try:
        for line in _STATUS.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return int(psutil.Process().memory_info().rss)


class HeapTrimmer:
    """Gives freed activations back to the system, at most once in `seconds`.

    Without it glibc keeps them in ever more broken pieces: 400 MiB after twenty layers
    of a 1.1B model, for a percent of the time. Does nothing on other C libraries.
    """

    def __init__(self, seconds: float = 0.5) -> None:
        self._seconds = seconds
        self._last = 0.0
        self._trim = getattr(ctypes.CDLL(None), "malloc_trim", None)

    def __call__(self) -> None:
        now = time.perf_counter()
        if self._trim is not None and now - self._last >= self._seconds:
            self._trim(0)
            self._last = time.perf_counter()


def _number(path: str) -> int | None:
    try:
        return int(Path(path).read_text())
    except (OSError, ValueError):
        return None

"""How much memory there is and was used, by psutil and the kernel's own counters."""

from pathlib import Path

import psutil

_STATUS = Path("/proc/self/status")


_CGROUP_FILES = (
    ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
    (
        "/sys/fs/cgroup/memory/memory.limit_in_bytes",
        "/sys/fs/cgroup/memory/memory.usage_in_bytes",
    ),
)


def installed_bytes() -> int:
    """Memory there is, used or not: the machine's, or its cgroup's limit if less."""
    found = int(psutil.virtual_memory().total)
    limits = (_number(limit_file) for limit_file, _ in _CGROUP_FILES)
    return min([found, *(limit for limit in limits if limit is not None)])


def available_bytes() -> int:
    """Memory this process can still take: the machine's, or its cgroup's if less."""
    free = int(psutil.virtual_memory().available)
    for limit_file, usage_file in _CGROUP_FILES:
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


def _number(path: str) -> int | None:
    try:
        return int(Path(path).read_text())
    except (OSError, ValueError):
        return None

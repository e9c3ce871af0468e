"""How much memory there is and is used, from psutil and the kernel's counters."""

import resource
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import psutil

from .cgroup import levels

_ROOT = Path("/")


@dataclass(frozen=True, slots=True)
class Usage:
    """The memory of this process, in bytes."""

    resident_bytes: int
    """Pages in memory, including those of library files."""
    file_bytes: int
    """The part of `resident_bytes` that are pages of files. They count as free memory,
    since they can be read again."""
    peak_bytes: int
    """The most that was resident at one time."""
    address_bytes: int = 0
    """The size of the address space, used or not."""
    data_bytes: int = 0
    """The private part of the address space."""


def installed_bytes(root: Path = _ROOT) -> int:
    """Bytes of memory of the machine, used or not; or the lowest limit of this
    process's cgroups, if that is less."""
    found = int(psutil.virtual_memory().total)
    return min([found, *(level.limit for level in levels(root))])


def available_bytes(root: Path = _ROOT) -> int:
    """Bytes of memory that this process can still take.

    That is what the machine, the cgroups and the limits of the process itself (`ulimit
    -v`, `-d`) leave, whichever is least. Page cache that the kernel can drop counts as
    free.
    """
    found = int(psutil.virtual_memory().available)
    by_cgroup = [level.available for level in levels(root)]
    return min([found, *by_cgroup, *_left_of_own_limits(usage(root))])


def usage(root: Path = _ROOT) -> Usage:
    """The memory that this process uses now."""
    found = _status(root)
    if "VmRSS" not in found:
        resident = int(psutil.Process().memory_info().rss)
        return Usage(resident, 0, resident)
    resident = found["VmRSS"]
    return Usage(
        resident,
        found.get("RssFile", 0),
        found.get("VmHWM", resident),
        found.get("VmSize", 0),
        found.get("VmData", 0),
    )


def peak_resident_bytes() -> int:
    """The most bytes that were resident at one time (VmHWM); if that is not known, the
    bytes that are resident now."""
    return usage().peak_bytes


def _left_of_own_limits(used: Usage) -> list[int]:
    """Bytes that each limit of this process on its own memory leaves."""
    taken = {
        resource.RLIMIT_AS: used.address_bytes,
        resource.RLIMIT_DATA: used.data_bytes,
    }
    soft = {kind: resource.getrlimit(kind)[0] for kind in taken}
    return [
        max(limit - taken[kind], 0)
        for kind, limit in soft.items()
        if limit != resource.RLIM_INFINITY
    ]


def _status(root: Path) -> Mapping[str, int]:
    """The sizes in /proc/self/status, in bytes."""
    found = {}
    try:
        text = (root / "proc/self/status").read_text(encoding="utf-8")
    except (OSError, ValueError):
        return {}
    for line in text.splitlines():
        name, _, value = line.partition(":")
        number, _, unit = value.strip().partition(" ")
        if unit == "kB" and number.isdecimal():
            found[name] = int(number) * 1024
    return found

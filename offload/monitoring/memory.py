"""How much memory there is and was used, by psutil and the kernel's own counters."""

import resource
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import psutil

from .cgroup import levels

_ROOT = Path("/")


@dataclass(frozen=True, slots=True)
class Usage:
    """What this process has of the memory, in bytes."""

    resident_bytes: int
    """Pages in memory, those of library files among them."""
    file_bytes: int
    """Of those, pages of files: they count as free memory, since they can be read
    again."""
    peak_bytes: int
    """The most that was resident at one time."""
    address_bytes: int = 0
    """Size of the address space, in use or not."""
    data_bytes: int = 0
    """The private part of the address space."""


def installed_bytes(root: Path = _ROOT) -> int:
    """Memory there is, used or not: the machine's, or the least limit of the cgroups
    that this process is in."""
    found = int(psutil.virtual_memory().total)
    return min([found, *(level.limit for level in levels(root))])


def available_bytes(root: Path = _ROOT) -> int:
    """Memory this process can still take: the machine's, or what its cgroups and its
    own limits (`ulimit -v`, `-d`) leave, if less. Page cache that the kernel can drop
    is free."""
    found = int(psutil.virtual_memory().available)
    by_cgroup = [level.available for level in levels(root)]
    return min([found, *by_cgroup, *_left_of_own_limits(usage(root))])


def usage(root: Path = _ROOT) -> Usage:
    """What this process takes now."""
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
    """Most resident memory of this process so far (VmHWM), else what it has now."""
    return usage().peak_bytes


def _left_of_own_limits(used: Usage) -> list[int]:
    """Bytes that the limits of this process on its own memory leave, where it has
    such."""
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
    """The sizes of /proc/self/status, in bytes."""
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

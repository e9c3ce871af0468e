"""Which memory is near which GPU, on machines where that differs (NUMA nodes)."""

import ctypes
import os
import platform
import sys
from pathlib import Path

SYSFS = Path("/sys")
_MBIND = {"x86_64": 237, "aarch64": 235}
"""Number of the system call: asm/unistd_64.h, asm-generic/unistd.h."""
_MPOL_PREFERRED = 1
_MAX_NODES = 1024


def nodes(sysfs: Path = SYSFS) -> tuple[int, ...]:
    """The nodes of this machine; none where it does not tell."""
    try:
        text = (sysfs / "devices/system/node/online").read_text()
    except OSError:
        return ()
    found: list[int] = []
    for part in text.strip().split(","):  # like 0-1,3
        first, _, last = part.partition("-")
        found += range(int(first), int(last or first) + 1)
    return tuple(found)


def node_near(pci: str, sysfs: Path = SYSFS) -> int | None:
    """The node that the PCI device (like 0000:3b:00.0) is on. None where nothing is to
    be gained: it is not known, or there is only one."""
    if len(nodes(sysfs)) < 2:
        return None
    try:
        node = int((sysfs / f"bus/pci/devices/{pci.lower()}/numa_node").read_text())
    except (OSError, ValueError):
        return None
    return node if node >= 0 else None


def bind(address: int, nbytes: int, node: int) -> str | None:
    """Asks that pages from `address` (a page's) on are taken from `node` when they are
    first written, as long as it has room: never a lack of memory. None, or a sentence
    that says why it was not done. Source: mbind(2)."""
    failed = f"memory is not bound to NUMA node {node}"
    number = _MBIND.get(platform.machine())
    if number is None or sys.platform != "linux":
        return f"{failed}: not known how on {sys.platform} {platform.machine()}"
    if not 0 <= node < _MAX_NODES:
        return f"{failed}: there is no such node"
    mask = (ctypes.c_ubyte * (_MAX_NODES // 8))()
    mask[node // 8] = 1 << node % 8  # both machines are little-endian
    result = ctypes.CDLL(None, use_errno=True).syscall(
        ctypes.c_long(number),
        ctypes.c_void_p(address),
        ctypes.c_ulong(nbytes),
        ctypes.c_ulong(_MPOL_PREFERRED),
        mask,
        ctypes.c_ulong(_MAX_NODES + 1),  # the kernel counts one less
        ctypes.c_ulong(0),
    )
    return f"{failed}: {os.strerror(ctypes.get_errno())}" if result else None

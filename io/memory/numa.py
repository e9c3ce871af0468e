"""Finds and uses the memory that is near a GPU, on machines with several NUMA nodes."""

import ctypes
import os
import platform
import sys
from pathlib import Path

SYSFS = Path("/sys")
_MBIND = {"x86_64": 237, "aarch64": 235}
"""Numbers of the system call. Source: asm/unistd_64.h, asm-generic/unistd.h."""
_MPOL_PREFERRED = 1
_MAX_NODES = 1024


def nodes(sysfs: Path = SYSFS) -> tuple[int, ...]:
    """The NUMA nodes of this machine; empty if they are not known."""
    try:
        text = (sysfs / "devices/system/node/online").read_text()
    except OSError:
        return ()
    numbers: list[int] = []
    for part in text.strip().split(","):  # like 0-1,3
        first, _, last = part.partition("-")
        numbers += range(int(first), int(last or first) + 1)
    return tuple(numbers)


def node_near(pci: str, sysfs: Path = SYSFS) -> int | None:
    """The NUMA node of the PCI device `pci` (such as 0000:3b:00.0).

    None if it is not known, or if the machine has only one node.
    """
    if len(nodes(sysfs)) < 2:
        return None
    try:
        node = int((sysfs / f"bus/pci/devices/{pci.lower()}/numa_node").read_text())
    except (OSError, ValueError):
        return None
    return node if node >= 0 else None


def bind(address: int, nbytes: int, node: int) -> str | None:
    """Asks the kernel to take the pages of a range from `node` at their first write.

    `address` is the start of a page. If the node is full, the kernel uses another one.
    Returns None, or a sentence that says why it failed. Source: mbind(2).
    """
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
        ctypes.c_ulong(_MAX_NODES + 1),  # the kernel subtracts one
        ctypes.c_ulong(0),
    )
    return f"{failed}: {os.strerror(ctypes.get_errno())}" if result else None

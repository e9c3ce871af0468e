"""The machine card: what a figure was measured on, and the rates of its products."""

import os
import platform
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psutil
import torch

from penstock.io.devices.accelerators import accelerators, title_of


def card(folder: Path) -> dict[str, Any]:
    """Facts about this computer. A value is None if the system does not tell it."""
    return {
        "cpu": _cpu_name(),
        "cores": psutil.cpu_count(logical=False),
        "threads_of_torch": torch.get_num_threads(),
        "cpu_features": _features(),
        "memory_bytes": psutil.virtual_memory().total,
        "disk_free_bytes": psutil.disk_usage(str(folder)).free,
        "file_system": _file_system(folder),
        "gpus": [title_of(name) for name in accelerators()],
        "kernel": platform.release(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": version("transformers"),
        "date": time.strftime("%Y-%m-%d"),
    }


def matmul_flops_per_second(rows: int, dtype: torch.dtype) -> float:
    """FLOP/s of a `rows` x 3072 x 8192 product; the best of five, after one to warm
    up."""
    a, w = torch.randn(rows, 3072).to(dtype), torch.randn(8192, 3072).to(dtype)
    torch.nn.functional.linear(a, w)
    best = float("inf")
    for _ in range(5):
        start = time.perf_counter()
        torch.nn.functional.linear(a, w)
        best = min(best, time.perf_counter() - start)
    return 2.0 * rows * 3072 * 8192 / best


def sustained_flops_per_second(
    rows: int, dtype: torch.dtype, seconds: float = 1.0
) -> float:
    """FLOP/s of the same products, repeated for `seconds`: the rate that a shared
    machine gives, not its best one."""
    a, w = torch.randn(rows, 3072).to(dtype), torch.randn(8192, 3072).to(dtype)
    torch.nn.functional.linear(a, w)
    start, num = time.perf_counter(), 0
    while (spent := time.perf_counter() - start) < seconds:
        torch.nn.functional.linear(a, w)
        num += 1
    return num * 2.0 * rows * 3072 * 8192 / spent


def evict(folder: Path) -> None:
    """Removes the files in `folder` (or that one file) from the page cache, so that
    they are read from the disk. Programs and libraries stay in it."""
    os.sync()
    for path in [folder, *folder.rglob("*")]:
        if path.is_file():
            descriptor = os.open(path, os.O_RDONLY)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(descriptor)


def _cpu_name() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor()


def _features() -> list[str]:
    flags = set(Path("/proc/cpuinfo").read_text().split())
    wanted = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_tile", "amx_bf16")
    return [flag for flag in wanted if flag in flags]


def _file_system(folder: Path) -> str | None:
    parts = psutil.disk_partitions(all=True)
    found = [p for p in parts if str(folder.resolve()).startswith(p.mountpoint)]
    return max(found, key=lambda p: len(p.mountpoint)).fstype if found else None

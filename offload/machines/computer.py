"""Facts about the computer that a run used, and versions of packages."""

import platform
from pathlib import Path
from typing import Any

import psutil
import torch

from ..settings.installed import version_of

_PACKAGES = ("penstock", "torch", "transformers", "safetensors")


def computer() -> dict[str, Any]:
    """The processor, memory (bytes), GPUs and kernel. A value is None if the system
    does not tell it."""
    return {
        "cpu": _cpu_name(),
        "cores": psutil.cpu_count(logical=False),
        "threads": torch.get_num_threads(),
        "memory_bytes": psutil.virtual_memory().total,
        "gpus": [
            torch.cuda.get_device_name(index)
            for index in range(torch.cuda.device_count())
        ],
        "kernel": f"{platform.system()} {platform.release()}",
    }


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that decide how a model runs."""
    return {"python": platform.python_version()} | {
        package: version_of(package) for package in _PACKAGES
    }


def has_bfloat16() -> bool:
    """Whether this processor has instructions for matrix products in bfloat16."""
    return _is_able("bf16") or bool(
        torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    )


def has_dtype(name: str) -> bool:
    """Whether this processor has instructions for matrix products in the dtype
    `name`."""
    if name == "bfloat16":
        return has_bfloat16()
    return name != "float16" or _is_able("fp16")


def _is_able(part: str) -> bool:
    """Whether torch reports an instruction set with `part` in its name, such as
    amx_bf16. False in versions of torch that report none."""
    tell = getattr(torch.cpu, "get_capabilities", dict)
    return any(value is True for name, value in tell().items() if part in name)


def _cpu_name() -> str | None:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    for line in lines:
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor() or None

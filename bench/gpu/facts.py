"""Describes what the suite ran on: computer, driver, versions.

Takes a few seconds; needs only torch.
"""

import platform
import subprocess
from importlib import metadata
from typing import Any

import torch

from gpu.common import Part

PACKAGES = (
    "torch",
    "triton",
    "transformers",
    "accelerate",
    "safetensors",
    "numpy",
    "greenlet",
    "pydantic",
    "libaio",
)
_QUERY = (
    "name,memory.total,driver_version,pcie.link.gen.current,pcie.link.width.current,"
    "clocks.max.sm,power.limit"
)


def versions() -> dict[str, str | None]:
    found: dict[str, str | None] = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = None
    return found


def gpu() -> dict[str, Any]:
    """Facts about the GPU, from torch and nvidia-smi."""
    card = torch.cuda.get_device_properties(0)
    found: dict[str, Any] = {
        "name": card.name,
        "memory_bytes": card.total_memory,
        "multiprocessors": card.multi_processor_count,
        "capability": f"{card.major}.{card.minor}",
        "cuda": torch.version.cuda,
    }
    done = subprocess.run(
        ["nvidia-smi", f"--query-gpu={_QUERY}", "--format=csv,noheader"],
        capture_output=True,
        text=True,
        check=False,
    )
    rows = done.stdout.splitlines()
    values = rows[0].split(", ") if rows else []
    found["nvidia_smi"] = dict(zip(_QUERY.split(","), values, strict=False))
    return found


def computer(part: Part) -> dict[str, Any]:
    from common import machine

    return machine.card(part.work)


def main() -> None:
    part = Part("machine", __doc__)
    part.put(versions=versions())
    if part.has_cuda:
        part.attempt("gpu", gpu)
    else:
        part.put(gpu="skipped: no CUDA")
    part.attempt("computer", lambda: computer(part))


if __name__ == "__main__":
    main()

"""Describes what the suite ran on: computer, accelerators, driver, versions.

Takes a few seconds; needs only torch.
"""

import platform
import resource
import shutil
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
_PROPERTIES = (
    "multi_processor_count",
    "major",
    "minor",
    "gcnArchName",
    "driver_version",
)
"""What some kinds of accelerators say of themselves, beside name and memory."""
_QUERY = (
    "name,memory.total,driver_version,pcie.link.gen.current,pcie.link.gen.max,"
    "pcie.link.width.current,clocks.max.sm,power.limit"
)


def versions() -> dict[str, str | None]:
    found: dict[str, str | None] = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = None
    return found


def gpu(part: Part) -> dict[str, Any]:
    """Facts about the accelerator, from torch and its maker's tool."""
    from penstock.io.devices.accelerators import memory_of

    card = part.module.get_device_properties(part.device)
    free, total = memory_of(str(part.device))
    found: dict[str, Any] = {
        "name": card.name,
        "memory_bytes": total,
        "free_bytes": free,
        "number": torch.accelerator.device_count(),
        "peer_access": _peer_access(part),
    }
    there = {name: getattr(card, name, None) for name in _PROPERTIES}
    found |= {name: value for name, value in there.items() if value is not None}
    if part.has_cuda:
        found["cuda"] = torch.version.cuda
        found["hip"] = torch.version.hip
        found["nvidia_smi"] = _nvidia_smi()
    return found


def _peer_access(part: Part) -> bool | str:
    if part.peer is None:
        return "there is one accelerator"
    from penstock.io.devices.accelerators import reaches

    return reaches(str(part.device), str(part.peer))


def _nvidia_smi() -> dict[str, str] | str:
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return "there is no nvidia-smi"
    done = subprocess.run(
        [tool, f"--query-gpu={_QUERY}", "--format=csv,noheader"],
        capture_output=True,
        text=True,
        check=False,
        timeout=15,
    )
    rows = done.stdout.splitlines()
    if done.returncode or not rows:
        return f"nvidia-smi ended with {done.returncode}: {done.stderr.strip()[:200]}"
    return dict(zip(_QUERY.split(","), rows[0].split(", "), strict=False))


def limits() -> dict[str, int]:
    """What the system lets this process have, in bytes; -1 is no limit."""
    from penstock.offload.monitoring.memory import available_bytes, installed_bytes

    return {
        "memory_bytes": installed_bytes(),
        "available_bytes": available_bytes(),
        "locked_memory_bytes": resource.getrlimit(resource.RLIMIT_MEMLOCK)[0],
        "shared_memory_free_bytes": shutil.disk_usage("/dev/shm").free,
    }


def computer(part: Part) -> dict[str, Any]:
    from common import machine

    return machine.card(part.work)


def main() -> None:
    part = Part("machine", __doc__)
    part.put(versions=versions())
    if part.has_gpu:
        part.attempt("gpu", lambda: gpu(part))
    else:
        part.put(gpu="skipped: no accelerator")
    part.attempt("computer", lambda: computer(part))
    part.attempt("limits", limits)


if __name__ == "__main__":
    main()

"""The accelerator that the suite runs on: the first one of this machine, or, in a dry
run, the simulated GPU of tests/simgpu."""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

SIMULATED = Path(__file__).resolve().parents[2] / "tests" / "simgpu"


@dataclass(frozen=True)
class Opened:
    """A device, and what the results say of it."""

    device: torch.device
    words: str


def open_device(*, is_dry: bool) -> Opened:
    """Chooses the device, which stays torch's accelerator until the process ends.

    A dry run falls back to the CPU where the simulated GPU cannot be compiled. Any
    other run exits if there is no accelerator.
    """
    if is_dry:
        return _simulated()
    kind = torch.accelerator.current_accelerator(check_available=True)
    if kind is None:
        sys.exit("torch finds no accelerator here; --dry-run needs none")
    return Opened(torch.device(kind.type, 0), f"{kind.type}:0")


def _simulated() -> Opened:
    sys.path.append(str(SIMULATED))
    import sim_build
    import sim_device  # it compiles the device where that has not been done

    try:
        sim_device.start()
    except (sim_build.NoCompilerError, RuntimeError) as error:
        return Opened(torch.device("cpu"), f"cpu: no simulated GPU, as {error}")
    return Opened(torch.device("simgpu", 0), "simgpu:0, the simulated GPU of the tests")


def module_of(device: torch.device) -> Any:
    """torch's module for devices of this kind, such as `torch.cuda`."""
    return torch.get_device_module(device)


def peer_of(device: torch.device) -> torch.device | None:
    """A second accelerator; None if there is only one."""
    if device.type == "cpu" or torch.accelerator.device_count() < 2:
        return None
    return torch.device(device.type, 1)

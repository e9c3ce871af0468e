"""Opens the device that a policy names."""

from .accelerator import AcceleratorDevice
from .device import CpuDevice, Device


def open_device(name: str) -> Device:
    """Returns the device called `name`. Raises PolicyError if there is none."""
    return CpuDevice() if name == "cpu" else AcceleratorDevice(name)

"""Opens the device that a policy names."""

from .accelerator import AcceleratorDevice
from .device import CpuDevice, Device


def open_device(name: str, num_sharing: int = 1) -> Device:
    """Returns the device called `name`, which `num_sharing` processes use. Raises
    PolicyError if there is none."""
    return CpuDevice() if name == "cpu" else AcceleratorDevice(name, num_sharing)

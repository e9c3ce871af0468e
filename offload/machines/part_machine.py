"""A machine as each of several processes on it has it. Pure."""

from collections.abc import Mapping

from ..policy import Policy
from .machine import Disk, Machine


def why_each_reads(policy: Policy, reader: str, *, is_on_gpu: bool) -> str:
    """Why each of several workers that read with `reader` reads all weights itself, or
    through the page cache, as far as the policy says; "" where they read the drive once
    for all of them."""
    if not policy.io.read_once:
        return "false: each worker reads all itself"
    if reader == "gds" and is_on_gpu:
        return "reads with gds go past the memory that workers could share"
    if not policy.io.direct or reader == "aiofiles":
        return "workers share the page cache, which files are read through"
    return ""


def part_of(machine: Machine, num: int, *, reads_once: bool = False) -> Machine:
    """The machine as one of `num` processes has it that all compute at the same time:
    with a device of its own where it has that many, and a part of the drive and of host
    memory. On a CPU also with a part of its cores and of their memory's bandwidth.
    `reads_once`: whether the drive is read once for all of them, and so is as fast for
    each as for one."""
    if num == 1:
        return machine
    disk = machine.disk
    if disk is not None and not reads_once:
        rates = {reader: int(rate / num) for reader, rate in disk.bandwidth.items()}
        disk = Disk(**{**disk.model_dump(), "bandwidth": rates})
    values: dict[str, object] = {
        "host_memory": machine.host_memory // num,
        "disk": disk,
        "num_devices": 1,
    }
    if machine.is_accelerated:
        sharing = -(-num // machine.num_devices)
        if machine.device_memory is not None:
            values["device_memory"] = machine.device_memory // sharing
    else:
        values |= _cores(machine, num)
    return machine.model_copy(update=values)


def _cores(machine: Machine, num: int) -> dict[str, object]:
    """The rates of a part of the cores."""
    found: dict[str, object] = {
        key: None if value is None else value // num
        for key in ("host_bandwidth", "device_bandwidth", "pointwise_bandwidth",
                    "decode_bandwidth")
        for value in [getattr(machine, key)]
    }  # fmt: skip
    for key in ("matmul", "attention"):
        rates: Mapping[str, Mapping[int, float]] = getattr(machine, key)
        found[key] = {
            dtype: {rows: rate / num for rows, rate in curve.items()}
            for dtype, curve in rates.items()
        }
    threads = machine.num_threads or machine.cores
    found["num_threads"] = max(1, threads // num)
    found["cores"] = max(1, machine.cores // num)
    return found

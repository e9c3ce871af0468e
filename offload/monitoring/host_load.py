"""Whether this machine was busy with other work while a job computed."""

import os
import time
from dataclasses import dataclass
from typing import Self

import psutil


@dataclass(frozen=True, slots=True, kw_only=True)
class CpuTimes:
    """Clocks of one moment, in seconds."""

    wall: float
    own: float
    """CPU time of this process, of all its threads."""
    idle: float
    """Of all cores of the machine, waiting for drives included. What a hypervisor gave
    to other guests is not idle."""

    @classmethod
    def now(cls) -> Self:
        host, own = psutil.cpu_times(), os.times()
        return cls(
            wall=time.perf_counter(),
            own=own.user + own.system,
            idle=host.idle + getattr(host, "iowait", 0.0),
        )


def taken_elsewhere(before: CpuTimes, after: CpuTimes, num_threads: int) -> float:
    """The share (0 to 1) of the CPU time of `num_threads` threads that this process
    could not have had between the two moments, however much of it there was to do:
    neither it had that time nor was it idle. Pure."""
    wanted = (after.wall - before.wall) * num_threads
    if wanted <= 0:
        return 0.0
    had = (after.own - before.own) + (after.idle - before.idle)
    return min(1.0, max(0.0, 1 - had / wanted))

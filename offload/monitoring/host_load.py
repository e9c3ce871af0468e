"""Measures whether this machine was busy with other work while a job computed."""

import os
import time
from dataclasses import dataclass
from typing import Self

import psutil


@dataclass(frozen=True, slots=True, kw_only=True)
class CpuTimes:
    """Times of one moment, in seconds."""

    wall: float
    own: float
    """CPU time of all threads of this process."""
    idle: float
    """Idle time of all cores of the machine, waiting for drives included. Time that a
    hypervisor gives to other guests is not idle."""

    @classmethod
    def now(cls) -> Self:
        host, own = psutil.cpu_times(), os.times()
        return cls(
            wall=time.perf_counter(),
            own=own.user + own.system,
            idle=host.idle + getattr(host, "iowait", 0.0),
        )


def taken_elsewhere(before: CpuTimes, after: CpuTimes, num_threads: int) -> float:
    """The share (0 to 1) of CPU time that other work took from this process.

    The process has `num_threads` threads. Of their time between `before` and `after`,
    the share is neither CPU time of this process nor idle. Pure.
    """
    wanted = (after.wall - before.wall) * num_threads
    if wanted <= 0:
        return 0.0
    had = (after.own - before.own) + (after.idle - before.idle)
    return min(1.0, max(0.0, 1 - had / wanted))

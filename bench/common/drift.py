"""Measures the rates of a machine at one moment, relative to those in its machine file.
On a shared host they vary."""

from __future__ import annotations

import statistics
import time
from pathlib import Path
from typing import Any

import torch

from penstock.offload.machines import measure
from penstock.offload.machines.machine import Machine
from penstock.offload.policy import IO

PROBE_ROWS = 512


class Probe:
    """Measures matrix products and the drive for a moment, relative to the machine's
    file."""

    def __init__(self, machine: Machine, file: Path) -> None:
        self._machine = machine
        self._file = file
        self._weights = [torch.randn(5632, 2048) for _ in range(3)]
        self._x = torch.randn(PROBE_ROWS, 2048)

    def __call__(self) -> tuple[float, float]:
        """Returns the ratios for (products, drive)."""
        seconds = []
        for weight in self._weights * 4:
            start = time.perf_counter()
            torch.nn.functional.linear(self._x, weight)
            seconds.append(time.perf_counter() - start)
        flops = 2 * PROBE_ROWS * 2048 * 5632 / statistics.median(seconds)
        found = measure.disk(self._file, IO(), lambda text: None)
        disk = self._machine.disk
        assert disk is not None, "it was measured"
        reader = disk.best_reader
        return (
            flops / self._machine.matmul["float32"][PROBE_ROWS],
            found.bandwidth[reader] / disk.bandwidth[reader],
        )


def drifted(machine: Machine, compute: float, disk: float) -> Machine:
    """The machine with its present rates: `compute` and `disk` times those of its
    file."""
    assert machine.disk is not None, "it was measured"

    def faster(rates: dict[Any, dict[Any, float]]) -> dict[Any, dict[Any, float]]:
        return {d: {n: r * compute for n, r in by.items()} for d, by in rates.items()}

    def scaled(value: int | None) -> int | None:
        return None if value is None else round(value * compute)

    calls = {key: value / compute for key, value in machine.calls.model_dump().items()}
    rates = {name: round(rate * disk) for name, rate in machine.disk.bandwidth.items()}
    values = machine.model_dump()
    values |= {
        "matmul": faster(values["matmul"]),
        "attention": faster(values["attention"]),
        "pointwise_bandwidth": scaled(machine.pointwise_bandwidth),
        "decode_bandwidth": scaled(machine.decode_bandwidth),
        "cast_bandwidth": scaled(machine.cast_bandwidth),
        "host_bandwidth": scaled(machine.host_bandwidth),
        "calls": calls,
        "disk": {**values["disk"], "bandwidth": rates},
    }
    return Machine(**values)

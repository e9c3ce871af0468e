"""Describes the readers of this computer, for `penstock machine`. Pure."""

from collections.abc import Mapping

from ...io.readers.choice import ReaderTrial, best_of
from ..monitoring.show import human_rate
from .machine import Disk

_CHOSEN_FROM = ("libaio", "threads")
"""The readers that `auto` chooses from."""


def reader_lines(disk: Disk, missing: Mapping[str, str]) -> list[str]:
    """One line for each reader.

    Says how fast it reads this drive and which one `io.reader: auto` takes. `missing`
    says why a reader is not available, and how to get it.
    """
    able = [name for name in _CHOSEN_FROM if name in disk.bandwidth]
    best = best_of([_trial(disk, name) for name in able]).reader if able else None
    lines = []
    for name, rate in disk.bandwidth.items():
        chosen = " (io.reader: auto takes it)" if name == best else ""
        lines.append(f"reader {name}: {human_rate(rate)}{chosen}")
    lines += [f"reader {name}: not here: {why}" for name, why in missing.items()]
    return lines


def _trial(disk: Disk, name: str) -> ReaderTrial:
    cost = disk.cpu_seconds_per_gb.get(name, 0.0)
    return ReaderTrial(name, disk.bandwidth[name], cost)

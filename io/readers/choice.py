"""Chooses the best reader for a drive by a short measurement, which is remembered."""

import json
import logging
import os
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median

import psutil

from ..checkpoint.header import FileStamp
from ..errors import CheckpointError
from ..extent import Extent
from ..fallbacks import Fallbacks
from ..memory.arena import Arena
from ..regular_file import read_json, read_json_object
from .files import reads_directly
from .reader import Reader

_log = logging.getLogger("penstock")
SAMPLE_BYTES = 64 << 20
_ROUNDS = 2
_NOISE = 0.03
"""Rates that differ by less than this fraction count as equal."""


@dataclass(frozen=True, slots=True)
class ReaderTrial:
    """The result of one reader's short run."""

    reader: str
    bytes_per_second: float
    cpu_seconds_per_gb: float


def best_of(trials: Sequence[ReaderTrial]) -> ReaderTrial:
    """The cheapest in CPU time of the trials about as fast as the fastest. Pure."""
    fastest = max(trial.bytes_per_second for trial in trials)
    good = [t for t in trials if t.bytes_per_second >= fastest * (1 - _NOISE)]
    return min(good, key=lambda trial: trial.cpu_seconds_per_gb)


def rounds_of(stamps: Mapping[Path, FileStamp], num_readers: int) -> int:
    """Rounds of measurement that the largest file is long enough for, at most six."""
    largest = max(stamp.size_bytes for stamp in stamps.values())
    return min(6, largest // (SAMPLE_BYTES * num_readers))


def measure(
    open_readers: Mapping[str, Callable[[], Reader]],
    stamps: Mapping[Path, FileStamp],
    *,
    rounds: int = _ROUNDS,
) -> list[ReaderTrial]:
    """Measures each reader on the largest file. No part of it is read twice.

    Returns an empty list if the file is too small to compare the readers.
    """
    path, stamp = max(stamps.items(), key=lambda item: item[1].size_bytes)
    samples = iter(range(0, stamp.size_bytes - SAMPLE_BYTES + 1, SAMPLE_BYTES))
    if not rounds or stamp.size_bytes < SAMPLE_BYTES * rounds * len(open_readers):
        return []
    rates: dict[str, list[float]] = defaultdict(list)
    costs: dict[str, list[float]] = defaultdict(list)
    with Arena(SAMPLE_BYTES) as arena:
        buffer = arena.view(0, SAMPLE_BYTES)
        for round_ in range(rounds):
            # Alternate the order, so that a drift in time favours no reader.
            for name in list(open_readers)[:: -1 if round_ % 2 else 1]:
                with open_readers[name]() as reader:
                    reader.submit(Extent(path, 0, reader.alignment), buffer).wait()
                    start, used = time.perf_counter(), time.process_time()
                    extent = Extent(path, next(samples), SAMPLE_BYTES)
                    reader.submit(extent, buffer).wait()
                    rates[name].append(SAMPLE_BYTES / (time.perf_counter() - start))
                    cost = (time.process_time() - used) / SAMPLE_BYTES * 1e9
                    costs[name].append(cost)
        buffer.release()
    return [ReaderTrial(n, median(rates[n]), median(costs[n])) for n in open_readers]


def choose(
    asked: str,
    makers: Mapping[str, Callable[[], Reader]],
    missing: Mapping[str, str],
    stamps: Mapping[Path, FileStamp],
    *,
    direct: bool,
    settings: str,
    remembered: "RememberedChoice",
    fallbacks: Fallbacks,
) -> str:
    """The name of the reader to use.

    `makers` has a function to open each reader. `missing` says why some readers are not
    available. `asked` is the name of a reader, or "auto" for the best one for the files
    in `stamps`. That is found by a short measurement, `remembered` by drive and
    `settings`. `fallbacks` learns of a missing reader only if it was asked for by name.
    """
    if asked in missing:
        fallbacks.announce(
            f"no reader {asked!r}: {missing[asked]}; another one is chosen"
        )
    elif asked != "auto":
        return asked
    path = max(stamps, key=lambda path: stamps[path].size_bytes)
    if not direct:
        return "aiofiles"
    if not reads_directly(path):
        fallbacks.announce(
            f"no O_DIRECT on {path.parent}: reading through the page cache"
        )
        return "aiofiles"
    available = {n: makers[n] for n in ("libaio", "threads") if n not in missing}
    if len(available) == 1:
        return next(iter(available))
    drive = f"{drive_of(path)}, {settings}"
    best = remembered.get(drive)
    if best is None or best.reader not in available:
        trials = measure(available, stamps)
        if not trials:
            return "threads"
        best = best_of(trials)
        remembered.put(drive, best)
        _log.info("measured on %s: %s; reading by %s", drive, trials, best.reader)
    return best.reader


class RememberedChoice:
    """The choices made on this computer, by drive, in the JSON file `path`.

    The file may be deleted at any time, and need not be writable.
    """

    def __init__(self, path: Path) -> None:
        self._path = path

    def get(self, drive: str) -> ReaderTrial | None:
        """The remembered trial for `drive`; None if there is none."""
        try:
            return ReaderTrial(**read_json(self._path)[drive])
        except (CheckpointError, KeyError, TypeError):
            return None

    def put(self, drive: str, trial: ReaderTrial) -> None:
        """Remembers `trial` for `drive`, if the file can be written."""
        try:
            known = read_json_object(self._path)
        except CheckpointError:
            known = {}
        known[drive] = asdict(trial)
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            descriptor, name = tempfile.mkstemp(dir=self._path.parent)
            with os.fdopen(descriptor, "w") as file:
                json.dump(known, file, indent=1)
            os.replace(name, self._path)
        except OSError as error:
            _log.info("the choice of a reader is not remembered: %s", error)


def drive_of(path: Path) -> str:
    """The drive that `path` lies on, as "device filesystem mountpoint"."""
    path = path.resolve()
    mounts = [
        part
        for part in psutil.disk_partitions(all=True)
        if path.is_relative_to(part.mountpoint)
    ]
    if not mounts:
        return f"device {os.stat(path).st_dev}"
    mount = max(mounts, key=lambda part: len(part.mountpoint))
    return f"{mount.device} {mount.fstype} {mount.mountpoint}"

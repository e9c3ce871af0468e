"""Which reader is best on this drive: measured briefly, once, and remembered."""

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
from ..memory.arena import Arena
from ..whole import read_json, read_json_object
from .files import reads_directly
from .reader import Reader

_log = logging.getLogger("penstock")
SAMPLE_BYTES = 64 << 20
_ROUNDS = 2
_NOISE = 0.03
"""Rates closer than this are equal: the one that costs less CPU is better."""


@dataclass(frozen=True, slots=True)
class ReaderTrial:
    """One reader's brief run."""

    reader: str
    bytes_per_second: float
    cpu_seconds_per_gb: float


def best_of(trials: Sequence[ReaderTrial]) -> ReaderTrial:
    """Among those as fast as the fastest, to within the noise, the one that costs the
    least CPU. Pure."""
    fastest = max(trial.bytes_per_second for trial in trials)
    good = [t for t in trials if t.bytes_per_second >= fastest * (1 - _NOISE)]
    return min(good, key=lambda trial: trial.cpu_seconds_per_gb)


def rounds_of(stamps: Mapping[Path, FileStamp], num_readers: int) -> int:
    """Turns of each reader for which the largest file is long enough, six at most."""
    largest = max(stamp.size_bytes for stamp in stamps.values())
    return min(6, largest // (SAMPLE_BYTES * num_readers))


def measure(
    open_readers: Mapping[str, Callable[[], Reader]],
    stamps: Mapping[Path, FileStamp],
    *,
    rounds: int = _ROUNDS,
) -> list[ReaderTrial]:
    """Lets each reader read parts of the largest file, in turns, never the same ones.
    Empty where the file is too small to tell them apart."""
    path, stamp = max(stamps.items(), key=lambda item: item[1].size_bytes)
    samples = iter(range(0, stamp.size_bytes - SAMPLE_BYTES + 1, SAMPLE_BYTES))
    if not rounds or stamp.size_bytes < SAMPLE_BYTES * rounds * len(open_readers):
        return []
    rates: dict[str, list[float]] = defaultdict(list)
    costs: dict[str, list[float]] = defaultdict(list)
    with Arena(SAMPLE_BYTES) as arena:
        buffer = arena.view(0, SAMPLE_BYTES)
        for round_ in range(rounds):
            # Back and forth, so that what changes with time is nobody's.
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
) -> tuple[str, tuple[str, ...]]:
    """The name of the reader to use, and what fell back, announced already.

    `makers` opens each reader there is, but those `missing` (why) cannot be had.
    `asked` is a name or "auto": the best for the files in `stamps` by a brief measure,
    which is `remembered` by drive and `settings`. What "auto" cannot choose from is no
    fallback: nobody asked for it.
    """
    fallbacks: list[str] = []

    def fall_back(message: str) -> None:
        fallbacks.append(message)
        _log.warning(message)

    if asked in missing:
        fall_back(f"no reader {asked!r}: {missing[asked]}; another one is chosen")
    elif asked != "auto":
        return asked, ()
    path = max(stamps, key=lambda path: stamps[path].size_bytes)
    if not direct:
        return "aiofiles", tuple(fallbacks)
    if not reads_directly(path):
        fall_back(f"no O_DIRECT on {path.parent}: reading through the page cache")
        return "aiofiles", tuple(fallbacks)
    able = {n: makers[n] for n in ("libaio", "threads") if n not in missing}
    if len(able) == 1:
        return next(iter(able)), tuple(fallbacks)
    drive = f"{drive_of(path)}, {settings}"
    best = remembered.get(drive)
    if best is None or best.reader not in able:
        trials = measure(able, stamps)
        if not trials:
            return "threads", tuple(fallbacks)
        best = best_of(trials)
        remembered.put(drive, best)
        _log.info("measured on %s: %s; reading by %s", drive, trials, best.reader)
    return best.reader, tuple(fallbacks)


class RememberedChoice:
    """The choices made on this computer, by drive: a JSON file that may be deleted at
    any time, and need not be writable."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def get(self, drive: str) -> ReaderTrial | None:
        try:
            return ReaderTrial(**read_json(self._path)[drive])
        except (CheckpointError, KeyError, TypeError):
            return None

    def put(self, drive: str, trial: ReaderTrial) -> None:
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
    """The drive that `path` lies on: its device and file system, as mounted here."""
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

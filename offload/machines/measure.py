"""Measures the processor, the memory and the drive of this computer, in about a
minute."""

import itertools
import os
import platform
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import torch
from torch.nn import functional

from ...io.checkpoint.header import FileStamp
from ...io.codecs.cast import copy_serially
from ...io.errors import UsageError
from ...io.extent import Extent
from ...io.fallbacks import Fallbacks
from ...io.memory.arena import Arena
from ...io.readers.choice import SAMPLE_BYTES, measure, rounds_of
from ..engine.readers import makers_of
from ..monitoring.show import human_bytes
from ..policy import IO
from .machine import Disk

_MOST_SECONDS = 0.3
_SCRATCH_BYTES = 1 << 30
_NUM_ROW_READS = 512


def seconds_of(
    act: Callable[[], Any],
    *,
    wait: Callable[[], None] = lambda: None,
    clock: Callable[[], float] = time.perf_counter,
    least: int = 3,
    most: int = 15,
) -> float:
    """The seconds of `act` followed by `wait`: the lower quartile of several runs.

    There are `least` to `most` runs, as many as fit in 0.3 seconds (fewer than `least`
    if they are very slow), after one to warm up. The lower quartile is used because a
    disturbance only makes a run slower.
    """
    act()
    wait()
    found: list[float] = []
    while (len(found) < least and sum(found) < 2 * _MOST_SECONDS) or (
        len(found) < most and sum(found) < _MOST_SECONDS
    ):
        start = clock()
        act()
        wait()
        found.append(clock() - start)
    return sorted(found)[len(found) // 4]


def product_seconds(device: str, wait: Callable[[], None]) -> float:
    """The seconds of a matrix product that has almost nothing to compute."""
    x, w = torch.randn(8, 64, device=device), torch.randn(64, 64, device=device)
    return seconds_of(lambda: functional.linear(x, w), wait=wait, least=50, most=500)


def memory_bandwidth(
    device: str, wait: Callable[[], None], nbytes: int = 256 << 20
) -> int:
    """Bytes read and written per second, by a copy of `nbytes`."""
    source = torch.zeros(nbytes, dtype=torch.uint8, device=device)
    target = torch.zeros_like(source)
    seconds = seconds_of(lambda: target.copy_(source), wait=wait)
    return round(2 * source.nbytes / seconds)


def cast_bandwidth() -> int:
    """Stored bytes per second that one thread casts from bfloat16 to float32.

    Casts in pieces, as weights are cast while they are loaded: from the cache into
    memory.
    """
    source = torch.zeros(2 << 20, dtype=torch.bfloat16)
    target = torch.zeros(64 << 20)
    pieces = itertools.cycle(torch.split(target, len(source)))
    cast = partial(_cast, pieces, source)
    return round(source.nbytes / seconds_of(cast, least=20, most=100))


def disk(place: Path, io: IO, progress: Callable[[str], None]) -> Disk:
    """Measures a drive with all available readers.

    `place` is a file to read, or a folder in which a scratch file is written. Raises
    OSError if that cannot be written, and UsageError if a file is too small.
    """
    if place.is_file():
        return _disk(place, io, progress)
    with scratch_file(place, _SCRATCH_BYTES) as path:
        return _disk(path, io, progress)


def _disk(path: Path, io: IO, progress: Callable[[str], None]) -> Disk:
    stamps = {path: FileStamp.of(path.stat())}
    makers, missing = makers_of(stamps, io, Fallbacks())
    able = {name: makers[name] for name in makers if name not in missing}
    progress(f"reading {path} by {', '.join(able)}")
    trials = measure(able, stamps, rounds=rounds_of(stamps, len(able)))
    if not trials:
        least = len(able) * SAMPLE_BYTES
        raise UsageError(
            f"{path} has {human_bytes(path.stat().st_size)}, too little to measure a "
            f"drive with: give a file of {human_bytes(least)} or more, or a folder"
        )
    reader = max(trials, key=lambda trial: trial.bytes_per_second)
    with makers[reader.reader]() as opened:
        row_read = _row_read_seconds(path, opened)
    return Disk(
        bandwidth={t.reader: round(t.bytes_per_second) for t in trials},
        cpu_seconds_per_gb={t.reader: t.cpu_seconds_per_gb for t in trials},
        row_read_seconds=row_read,
        **disk_sizes(path),
    )


def disk_sizes(place: Path) -> dict[str, int]:
    """The bytes of the file system that `place` lies on, or will, and those that are
    free; none if it does not say."""
    path = place.absolute()
    there = next((p for p in (path, *path.parents) if p.exists()), path)
    try:
        found = shutil.disk_usage(there)
    except OSError:
        return {}
    return {"capacity": found.total, "free": found.free}


def _row_read_seconds(path: Path, reader: Any) -> float:
    """The seconds of one short read; many, spread over the file, are requested at
    once."""
    size = max(4096, reader.alignment)
    stride = path.stat().st_size // _NUM_ROW_READS // size * size
    with Arena(size * _NUM_ROW_READS) as arena:
        start = time.perf_counter()
        handles = [
            reader.submit(
                Extent(path, index * stride, size), arena.view(index * size, size)
            )
            for index in range(_NUM_ROW_READS)
        ]
        for handle in handles:
            handle.wait()
        seconds = time.perf_counter() - start
        del handles
    return seconds / _NUM_ROW_READS


@contextmanager
def scratch_file(folder: Path, nbytes: int) -> Iterator[Path]:
    """Creates a file of random bytes in `folder` that is not in the page cache. It is
    deleted at the end."""
    with tempfile.NamedTemporaryFile(dir=folder, prefix="penstock-scratch-") as file:
        piece = os.urandom(8 << 20)
        for _ in range(nbytes // len(piece)):
            file.write(piece)
        file.flush()
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        yield Path(file.name)


def host_facts() -> dict[str, Any]:
    """The number of cores and threads, and the bytes of memory."""
    return {
        "cores": psutil.cpu_count(logical=False) or os.cpu_count() or 1,
        "num_threads": torch.get_num_threads(),
        "host_memory": int(psutil.virtual_memory().total),
    }


def cpu_name() -> str:
    """The name of the processor, as the kernel tells it."""
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _cast(pieces: Iterator[torch.Tensor], source: torch.Tensor) -> None:
    copy_serially(next(pieces), source)

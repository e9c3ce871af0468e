"""The ways to read a file that bench/tiers.py compares."""

import json
import os
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from penstock.io.checkpoint.header import FileStamp
from penstock.io.extent import Extent
from penstock.io.fallbacks import Fallbacks
from penstock.io.memory.arena import Arena
from penstock.io.readers.libaio_reader import LibaioReader
from penstock.io.readers.reader import Reader
from penstock.io.readers.threads import ThreadReader


@dataclass(frozen=True)
class Case:
    """A way to read, with one size and depth."""

    way: str
    chunk_bytes: int
    depth: int


def make_file(path: Path, nbytes: int) -> None:
    """Writes random bytes: a drive that compresses must not look faster than it is."""
    if path.exists() and path.stat().st_size == nbytes:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        for start in range(0, nbytes, 64 << 20):
            file.write(os.urandom(min(64 << 20, nbytes - start)))
        os.fsync(file.fileno())


def plain_loop(path: Path, case: Case, arena: Arena) -> float | None:
    """The simplest way: `depth` threads, each with a stripe of the file, call preadv
    into the same memory as the readers. There is no queue, no handle and no check."""
    size, chunk = path.stat().st_size, case.chunk_bytes
    descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_DIRECT", 0))

    def stripe(lane: int) -> None:
        for offset in range(lane * chunk, size, chunk * case.depth):
            buffer = arena.view(offset % arena.nbytes, chunk)
            os.preadv(descriptor, [buffer], offset)
            buffer.release()

    try:
        with ThreadPoolExecutor(case.depth) as pool:
            list(pool.map(stripe, range(case.depth)))
    finally:
        os.close(descriptor)
    return None


def fio(path: Path, case: Case, arena: Arena) -> float | None:
    """The rate that fio measures, without its start, in bytes per second."""
    command = [
        "fio",
        "--name=ceiling",
        f"--filename={path}",
        "--readonly",
        "--rw=read",
        "--direct=1",
        "--ioengine=libaio",
        f"--bs={case.chunk_bytes}",
        f"--iodepth={case.depth}",
        "--output-format=json",
    ]
    done = subprocess.run(command, check=True, capture_output=True)
    return float(json.loads(done.stdout)["jobs"][0]["read"]["bw_bytes"])


def by_reader(path: Path, case: Case, arena: Arena) -> float | None:
    """Reads the whole file, one slot at a time, with two reads in flight.

    Returns the rate in bytes per second, without opening and closing the reader, which
    a model does once for all its passes.
    """
    size, half = path.stat().st_size, arena.nbytes // 2
    with reader_of(path, case) as reader:
        start = time.perf_counter()
        handles: list[Any] = [None, None]
        for number, offset in enumerate(range(0, size, half)):
            lane = number % 2
            if handles[lane] is not None:
                handles[lane].wait()
            extent = Extent(path, offset, min(half, size - offset))
            view = arena.view(lane * half, extent.nbytes)
            handles[lane] = reader.submit(extent, view)
        for handle in filter(None, handles):
            handle.wait()
        return size / (time.perf_counter() - start)


def reader_of(path: Path, case: Case) -> Reader:
    stamps = {path: FileStamp.of(path.stat())}
    depth, chunk = case.depth, case.chunk_bytes
    if case.way == "libaio":
        return LibaioReader(
            stamps, depth=depth, chunk_bytes=chunk, direct=True, fallbacks=Fallbacks()
        )
    if case.way == "threads":
        return ThreadReader(
            stamps,
            num_threads=depth,
            chunk_bytes=chunk,
            direct=True,
            fallbacks=Fallbacks(),
        )
    from penstock.io.readers.aiofiles_reader import AiofilesReader  # may be missing

    return AiofilesReader(stamps, num_tasks=depth, chunk_bytes=chunk)

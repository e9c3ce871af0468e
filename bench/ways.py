"""The ways to read a file that bench/tiers.py compares."""

import json
import os
import subprocess
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from penstock.io.aio import LibaioReader
from penstock.io.arena import Arena
from penstock.io.buffered import AiofilesReader
from penstock.io.extent import Extent
from penstock.io.header import FileStamp
from penstock.io.reader import Reader
from penstock.io.threads import ThreadReader


@dataclass(frozen=True)
class Case:
    """One way to read at one size and depth."""

    way: str
    chunk_bytes: int
    depth: int


def make_file(path: Path, nbytes: int) -> None:
    """Random bytes: a drive that compresses must not look faster than it is."""
    if path.exists() and path.stat().st_size == nbytes:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        for start in range(0, nbytes, 64 << 20):
            file.write(os.urandom(min(64 << 20, nbytes - start)))
        os.fsync(file.fileno())


def plain_loop(path: Path, case: Case) -> float | None:
    """The plainest way: `depth` threads, each a stripe, preadv into huge pages and
    nothing else; no queue, no handle, no check."""
    size = path.stat().st_size
    descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_DIRECT", 0))

    def stripe(lane: int) -> None:
        with Arena(case.chunk_bytes) as arena:
            buffer = arena.view(0, case.chunk_bytes)
            step = case.chunk_bytes * case.depth
            for offset in range(lane * case.chunk_bytes, size, step):
                os.preadv(descriptor, [buffer], offset)
            buffer.release()

    try:
        with ThreadPoolExecutor(case.depth) as pool:
            list(pool.map(stripe, range(case.depth)))
    finally:
        os.close(descriptor)
    return None


def fio(path: Path, case: Case) -> float | None:
    """The ceiling by the tool that storage people use, without its start: its rate."""
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


def by_reader(
    open_reader: Callable[[], Reader], path: Path, arena: Arena
) -> float | None:
    """The whole file, a slot's worth at a time with two under way."""
    size, half = path.stat().st_size, arena.nbytes // 2
    with open_reader() as reader:
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
    return None


def reader_of(case: Case, stamps: dict[Path, FileStamp]) -> Callable[[], Reader]:
    if case.way == "libaio":
        return partial(
            LibaioReader,
            stamps,
            depth=case.depth,
            chunk_bytes=case.chunk_bytes,
            direct=True,
        )
    if case.way == "threads":
        return partial(
            ThreadReader,
            stamps,
            num_threads=case.depth,
            chunk_bytes=case.chunk_bytes,
            direct=True,
        )
    return partial(
        AiofilesReader, stamps, num_tasks=case.depth, chunk_bytes=case.chunk_bytes
    )

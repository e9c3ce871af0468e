"""Measures how fast files arrive that are not cached: in host memory, by each reader,
and on the device, by way of pinned memory or directly."""

import os
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from gpu.common import Part, lacking
from penstock.io.checkpoint.header import FileStamp
from penstock.io.extent import Extent
from penstock.io.fallbacks import Fallbacks
from penstock.io.memory.arena import Arena
from penstock.io.memory.pinned import Pinned, registrar_of
from penstock.io.readers import gds
from penstock.io.readers import libaio_reader as aio

MIB = 1 << 20
CHUNK, DEPTH = 8 * MIB, 4
_BLOCK = 64 * MIB
_WRITE_SECONDS = 8.0
"""After so long, the file is as large as it is: on a slow drive there is no time for
more."""


def write(path: Path, nbytes: int) -> int:
    """Writes up to `nbytes` of random bytes, and returns how many.

    Each block of 64 MiB is another one, rotated: a drive that compresses must not look
    faster than it is, and making random bytes takes longer than writing them.
    """
    random = os.urandom(min(_BLOCK, nbytes))
    start, written = time.perf_counter(), 0
    with path.open("wb") as file:
        while written < nbytes and time.perf_counter() - start < _WRITE_SECONDS:
            shift = written // _BLOCK * 4099 % len(random)
            file.write(random[shift:])
            file.write(random[:shift])
            file.flush()
            os.fsync(file.fileno())
            written += len(random)
    return written


def read(path: Path, nbytes: int, way: str, arena: Arena) -> float:
    """Bytes per second of one reader, in chunks of 8 MiB with four reads in flight."""
    from common import machine
    from common.read_methods import Case, by_reader, plain_loop

    run = plain_loop if way == "plain loop" else by_reader
    machine.evict(path)
    start = time.perf_counter()
    rate = run(path, Case(way, CHUNK, DEPTH), arena)
    return rate or nbytes / (time.perf_counter() - start)


def through_host(part: Part, path: Path, nbytes: int, way: str) -> dict[str, Any]:
    """Bytes per second from the drive through pinned memory to the device.

    One half of the pinned memory is read into while the other one is copied out of, on
    a stream of its own; an event says when it may be read into again.
    """
    from common import machine
    from common.read_methods import Case, reader_of

    half = min(2 * CHUNK * DEPTH, nbytes // 2)
    target = torch.empty(half, dtype=torch.uint8, device=part.device)
    stream = torch.Stream(part.device)
    machine.evict(path)
    with (
        Arena(2 * half) as arena,
        Pinned(
            arena.view(0, arena.nbytes),
            max_bytes=arena.nbytes,
            chunk_bytes=arena.nbytes,
            registrar=registrar_of(part.module) if part.has_gpu else None,
        ) as pinned,
        reader_of(path, Case(way, CHUNK, DEPTH)) as reader,
    ):
        extents = [
            Extent(path, start, min(half, nbytes - start))
            for start in range(0, nbytes, half)
        ]
        copied: list[torch.Event | None] = [None, None]

        def submit(number: int) -> Any:
            event = copied[number % 2]
            if event is not None:
                event.synchronize()
            view = arena.view(number % 2 * half, extents[number].nbytes)
            return reader.submit(extents[number], view)

        begin = time.perf_counter()
        handle = submit(0)
        for number, extent in enumerate(extents):
            handle.wait()
            if number + 1 < len(extents):
                handle = submit(number + 1)
            with stream:
                source = arena.tensor(number % 2 * half, extent.nbytes)
                target[: extent.nbytes].copy_(source, non_blocking=True)
            event = torch.Event(part.device)
            event.record(stream)
            copied[number % 2] = event
        stream.synchronize()
        seconds = time.perf_counter() - begin
        return {
            "reader": way,
            "bytes_per_second": nbytes / seconds,
            "fallback": pinned.fallback,
        }


def directly(part: Part, path: Path, nbytes: int) -> float | str:
    """Bytes per second from the drive directly into device memory (NVIDIA's cuFile)."""
    from common import machine

    if (reason := gds.why_not(part.device, path)) is not None:
        return f"not used: {reason}"
    target = torch.empty(nbytes, dtype=torch.uint8, device=part.device)
    stamps = {path: FileStamp.of(path.stat())}
    with gds.GdsReader(
        stamps, num_threads=DEPTH, chunk_bytes=CHUNK, fallbacks=Fallbacks()
    ) as reader:
        machine.evict(path)
        return nbytes / _seconds(
            lambda: reader.submit(Extent(path, 0, nbytes), target).wait()
        )


def measure(part: Part) -> None:
    """Adds the rates to the figures of `part`, each as it is measured."""
    path = (part.work / "links.bin").resolve()
    begin = time.perf_counter()
    nbytes = write(path, 16 * MIB if part.is_dry else 4096 * MIB)
    part.put(
        disk_file_bytes=nbytes,
        disk_write_bytes_per_second=nbytes / (time.perf_counter() - begin),
    )
    ways = ["plain loop", "threads"]
    if lacking(("aiofiles",)) is None:
        ways.append("aiofiles")
    if (reason := aio.why_not()) is None:
        ways.append("libaio")
    else:
        part.put(why_no_libaio=reason)
    with Arena(64 * MIB) as arena:
        arena.tensor(0, arena.nbytes).zero_()
        found = {
            way: part.attempt(
                f"disk_{way.replace(' ', '_')}_bytes_per_second",
                partial(read, path, nbytes, way, arena),
            )
            for way in ways
        }
    readers = {way: rate for way, rate in found.items() if rate and way != "plain loop"}
    if part.has_gpu and readers:
        best = max(readers, key=lambda way: readers[way])
        part.attempt("disk_to_device", lambda: through_host(part, path, nbytes, best))
    part.attempt("gds_bytes_per_second", lambda: directly(part, path, nbytes))
    path.unlink()


def _seconds(act: Callable[[], object]) -> float:
    start = time.perf_counter()
    act()
    return time.perf_counter() - start

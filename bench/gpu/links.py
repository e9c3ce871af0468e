"""Measures the rates of the links and of the matrix products: the ceilings of the other
parts.

Copies run on a stream of their own, as many as make `TOTAL` bytes, and the clock stops
when the device has finished. Rates count each byte once, although a copy within the
device reads and writes it.

Takes at most 70 seconds; needs 4 GiB of a real drive, and a GPU for its links.
"""

import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from gpu.common import Part

MIB = 1 << 20
CHUNKS = (MIB, 4 * MIB, 16 * MIB, 64 * MIB, 256 * MIB, 1024 * MIB)
TOTAL = 4096 * MIB
ROWS = (512, 1024, 2048, 4096, 8192, 16384)


def copy_rate(
    part: Part, target: torch.Tensor, source: torch.Tensor, chunk: int, total: int
) -> float:
    """Bytes per second of repeated copies, chunk by chunk."""
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    num = max(1, total // chunk)
    room = min(len(target), len(source)) // chunk

    def act() -> None:
        with torch.cuda.stream(stream):
            for index in range(num):
                at = index % room * chunk
                target[at : at + chunk].copy_(
                    source[at : at + chunk], non_blocking=True
                )

    return num * chunk / part.seconds_of(act)


def copy_rates(
    part: Part,
    target: torch.Tensor,
    source: torch.Tensor,
    chunks: tuple[int, ...],
    total: int,
) -> dict[str, float]:
    return {str(n): copy_rate(part, target, source, n, total) for n in chunks}


def both_ways(part: Part, buffers: dict[str, torch.Tensor]) -> dict[str, float]:
    """Bytes per second of each direction while the other direction is busy."""
    down = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    up = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    half = len(buffers["device"]) // 2
    num = max(1, TOTAL // 2 // half)

    def act() -> None:
        for _ in range(num):
            with torch.cuda.stream(down):
                buffers["device"][:half].copy_(buffers["pinned"][:half], True)
            with torch.cuda.stream(up):
                buffers["pinned"][half:].copy_(buffers["device"][half:], True)

    each = num * half / part.seconds_of(act)
    return {"each_bytes_per_second": each, "sum_bytes_per_second": 2 * each}


def registered(part: Part) -> dict[str, Any]:
    """The rates of copies from Penstock's own pinned memory: huge pages,
    cudaHostRegister."""
    from penstock.io.memory.arena import Arena
    from penstock.io.memory.pinned import Pinned, registrar_of

    nbytes = 1024 * MIB
    with (
        Arena(nbytes) as arena,
        Pinned(
            arena.view(0, nbytes),
            max_bytes=nbytes,
            chunk_bytes=nbytes,
            registrar=registrar_of(torch.cuda),
        ) as pinned,
    ):
        target = torch.empty(nbytes, dtype=torch.uint8, device=part.device)
        rates = {
            str(chunk): copy_rate(part, target, arena.tensor(0, nbytes), chunk, TOTAL)
            for chunk in (64 * MIB, 1024 * MIB)
        }
        return {"bytes_per_second": rates, "fallback": pinned.fallback}


def copies(part: Part) -> None:
    nbytes = max(CHUNKS)
    device = torch.empty(nbytes, dtype=torch.uint8, device=part.device)
    pinned = torch.empty(nbytes, dtype=torch.uint8, pin_memory=True).fill_(1)
    pageable = torch.empty(nbytes, dtype=torch.uint8).fill_(1)
    other = torch.empty_like(device)
    ways: dict[str, tuple[torch.Tensor, torch.Tensor, int]] = {
        "pinned_h2d": (device, pinned, TOTAL),
        "d2h": (pinned, device, TOTAL),
        "pageable_h2d": (device, pageable, TOTAL // 4),
        "device_to_device": (other, device, 16 * TOTAL),
    }
    for name, (target, source, total) in ways.items():
        chunks = CHUNKS if name == "pinned_h2d" else (16 * MIB, 256 * MIB, 1024 * MIB)
        part.attempt(
            f"{name}_bytes_per_second",
            partial(copy_rates, part, target, source, chunks, total),
        )
    part.attempt(
        "both_ways", lambda: both_ways(part, {"device": device, "pinned": pinned})
    )
    part.attempt("registered_h2d", lambda: registered(part))


def matmul(part: Part, rows: int, width: int, depth: int) -> float:
    """FLOP/s of a product [rows, depth] x [depth, width] in bfloat16, as a Linear
    computes it."""
    a = torch.randn(rows, depth, device=part.device).bfloat16()
    w = torch.randn(width, depth, device=part.device).bfloat16()
    repeats = max(1, int(2e13 / (2 * rows * width * depth))) if part.has_cuda else 1

    def act() -> None:
        for _ in range(repeats):
            torch.nn.functional.linear(a, w)

    return 2.0 * rows * width * depth * repeats / part.seconds_of(act)


def matmuls(part: Part) -> None:
    rows = (16, 32) if part.is_dry else ROWS
    width, depth = (256, 128) if part.is_dry else (28672, 8192)
    part.attempt(
        "bf16_matmul_flops_per_second",
        lambda: {str(num): matmul(part, num, width, depth) for num in rows},
    )


def disk(part: Part) -> dict[str, Any]:
    """The rates of each reader over a file that is not cached, in chunks of 8 MiB, with
    four reads in flight."""
    from common import machine
    from common.read_methods import Case, by_reader, make_file, plain_loop
    from penstock.io.memory.arena import Arena
    from penstock.io.readers import libaio_reader as aio

    path = (part.work / "links.bin").resolve()
    nbytes = 16 * MIB if part.is_dry else 4096 * MIB
    make_file(path, nbytes)
    names = ["plain loop", "threads", "aiofiles"]
    if (reason := aio.why_not()) is None:
        names.append("libaio")
    found: dict[str, Any] = {"bytes": nbytes, "why_no_libaio": reason}
    with Arena(64 * MIB) as arena:
        arena.tensor(0, arena.nbytes).zero_()
        for name in names:
            way = plain_loop if name == "plain loop" else by_reader
            machine.evict(path)
            start = time.perf_counter()
            rate = way(path, Case(name, 8 * MIB, 4), arena)
            found[name] = rate or nbytes / (time.perf_counter() - start)
    found["gds"] = _gds(part, path, nbytes) if part.has_cuda else "skipped: no CUDA"
    path.unlink()
    return found


def _gds(part: Part, path: Any, nbytes: int) -> Any:
    """The rate of reading from the drive directly into device memory."""
    from common import machine
    from penstock.io.checkpoint.header import FileStamp
    from penstock.io.extent import Extent
    from penstock.io.fallbacks import Fallbacks
    from penstock.io.readers.gds import GdsReader, why_not

    if (reason := why_not(part.device, path)) is not None:
        return f"not used: {reason}"
    target = torch.empty(nbytes, dtype=torch.uint8, device=part.device)
    stamps = {path: FileStamp.of(path.stat())}
    with GdsReader(
        stamps, num_threads=4, chunk_bytes=8 * MIB, fallbacks=Fallbacks()
    ) as reader:
        machine.evict(path)
        return nbytes / _seconds(
            lambda: reader.submit(Extent(path, 0, nbytes), target).wait()
        )


def _seconds(act: Callable[[], object]) -> float:
    start = time.perf_counter()
    act()
    return time.perf_counter() - start


def main() -> None:
    part = Part("links", __doc__)
    if part.has_cuda:
        copies(part)
    else:
        part.put(copies="skipped: no CUDA")
    matmuls(part)
    part.attempt("disk_bytes_per_second", lambda: disk(part))


if __name__ == "__main__":
    main()

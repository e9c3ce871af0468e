"""Measures the rates of the links and of the matrix products: the ceilings of the other
parts.

Copies run on a stream of their own, as many as make a few GiB, and events of that
stream take the time. Rates count each byte once, although a copy within the device
reads and writes it.

Takes at most 75 seconds; needs 4 GiB of a real drive, and a GPU for its links.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from gpu import disks
from gpu.common import Part

KIB, MIB = 1 << 10, 1 << 20


@dataclass(frozen=True)
class Sizes:
    """How much is copied, in bytes, and how large the products are."""

    chunks: tuple[int, ...]
    """Of one copy each; the last is the size of the buffers."""
    total: int
    rows: tuple[int, ...]
    width: int
    depth: int

    @property
    def few(self) -> tuple[int, ...]:
        return self.chunks[-3:]


REAL = Sizes(
    chunks=(MIB, 4 * MIB, 16 * MIB, 64 * MIB, 256 * MIB, 1024 * MIB),
    total=4096 * MIB,
    rows=(512, 1024, 2048, 4096, 8192, 16384),
    width=28672,
    depth=8192,
)
TINY = Sizes(
    chunks=(4 * KIB, 16 * KIB, 64 * KIB, 256 * KIB),
    total=512 * KIB,
    rows=(16, 32),
    width=256,
    depth=128,
)


def copy_rate(
    part: Part, target: torch.Tensor, source: torch.Tensor, chunk: int, total: int
) -> float:
    """Bytes per second of repeated copies, chunk by chunk."""
    num = max(1, total // chunk)
    room = min(len(target), len(source)) // chunk

    def act() -> None:
        for index in range(num):
            at = index % room * chunk
            target[at : at + chunk].copy_(source[at : at + chunk], non_blocking=True)

    return num * chunk / part.seconds_on(torch.Stream(part.device), act)


def copy_rates(
    part: Part,
    target: torch.Tensor,
    source: torch.Tensor,
    chunks: tuple[int, ...],
    total: int,
) -> dict[str, float]:
    return {str(n): copy_rate(part, target, source, n, total) for n in chunks}


def both_ways(
    part: Part, device: torch.Tensor, pinned: torch.Tensor, total: int
) -> dict[str, float]:
    """Bytes per second of each direction while the other direction is busy."""
    down, up = torch.Stream(part.device), torch.Stream(part.device)
    half = len(device) // 2
    num = max(1, total // 2 // half)

    def act() -> None:
        for _ in range(num):
            with down:
                device[:half].copy_(pinned[:half], non_blocking=True)
            with up:
                pinned[half:].copy_(device[half:], non_blocking=True)

    each = num * half / part.seconds_of(act)
    return {"each_bytes_per_second": each, "sum_bytes_per_second": 2 * each}


def registered(part: Part, sizes: Sizes) -> dict[str, Any]:
    """The rates of copies from Penstock's own pinned memory: huge pages, registered
    with the runtime."""
    from penstock.io.memory.arena import Arena
    from penstock.io.memory.pinned import Pinned, registrar_of

    nbytes = sizes.chunks[-1]
    with (
        Arena(nbytes) as arena,
        Pinned(
            arena.view(0, nbytes),
            max_bytes=nbytes,
            chunk_bytes=nbytes,
            registrar=registrar_of(part.module),
        ) as pinned,
    ):
        target = torch.empty(nbytes, dtype=torch.uint8, device=part.device)
        source = arena.tensor(0, nbytes)
        rates = copy_rates(part, target, source, sizes.few[::2], sizes.total)
        part.synchronize()
        return {"bytes_per_second": rates, "fallback": pinned.fallback}


def copies(part: Part, sizes: Sizes) -> None:
    nbytes, total = sizes.chunks[-1], sizes.total
    device = torch.empty(nbytes, dtype=torch.uint8, device=part.device)
    pinned = torch.empty(nbytes, dtype=torch.uint8, pin_memory=True).fill_(1)
    pageable = torch.empty(nbytes, dtype=torch.uint8).fill_(1)
    other = torch.empty_like(device)
    ways: dict[str, tuple[torch.Tensor, torch.Tensor, int]] = {
        "pinned_h2d": (device, pinned, total),
        "pinned_d2h": (pinned, device, total),
        "pageable_h2d": (device, pageable, total // 4),
        "pageable_d2h": (pageable, device, total // 4),
        "device_to_device": (other, device, 16 * total),
    }
    if part.peer is not None:
        distant = torch.empty_like(device, device=part.peer)
        ways["from_peer"] = (device, distant, 4 * total)
        ways["to_peer"] = (distant, device, 4 * total)
    else:
        part.put(from_peer_bytes_per_second="skipped: there is one accelerator")
    for name, (target, source, num) in ways.items():
        chunks = sizes.chunks if name == "pinned_h2d" else sizes.few
        part.attempt(
            f"{name}_bytes_per_second",
            partial(copy_rates, part, target, source, chunks, num),
        )
    part.attempt("both_ways", lambda: both_ways(part, device, pinned, total))
    part.attempt("registered_h2d", lambda: registered(part, sizes))


def matmul(part: Part, rows: int, width: int, depth: int) -> float:
    """FLOP/s of a product [rows, depth] x [depth, width] in bfloat16, as a Linear
    computes it."""
    a = torch.randn(rows, depth, device=part.device).bfloat16()
    w = torch.randn(width, depth, device=part.device).bfloat16()
    flops = 2.0 * rows * width * depth
    repeats = 1 if part.is_dry else max(1, int(2e13 / flops))

    def act() -> None:
        for _ in range(repeats):
            torch.nn.functional.linear(a, w)

    return flops * repeats / part.seconds_of(act)


def matmuls(part: Part, sizes: Sizes) -> dict[str, float]:
    return {str(num): matmul(part, num, sizes.width, sizes.depth) for num in sizes.rows}


def main() -> None:
    part = Part("links", __doc__)
    sizes = TINY if part.is_dry else REAL
    if part.has_gpu:
        copies(part, sizes)
    else:
        part.put(copies="skipped: no accelerator")
    part.attempt("bf16_matmul_flops_per_second", lambda: matmuls(part, sizes))
    part.give_back()
    disks.measure(part)


if __name__ == "__main__":
    main()

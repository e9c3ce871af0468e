"""Measures what casting takes from computing where both have the same cores.

More than the cores' share of it: a product is divided evenly among threads, so it waits
for the one whose core casts, and both want the same caches and memory.
"""

import itertools
import statistics
import threading
import time
from collections.abc import Iterator, Sequence

import torch
from torch.nn import functional

from ...io.loader import copy_serially

_SHAPE = (2048, 5632)
_ROWS = 64
_ROUND_SECONDS = 0.4
_ROUNDS = 5
_REST = 1.5
"""Of a cast's time, after each: weights that stream are not cast all the time."""


class _Caster:
    """A thread that casts and rests, over and over, within its block."""

    def __init__(self, source: torch.Tensor, pieces: Sequence[torch.Tensor]) -> None:
        self._source = source
        self._pieces = pieces
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._work)
        self.num_bytes = 0

    def __enter__(self) -> "_Caster":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _work(self) -> None:
        for piece in itertools.cycle(self._pieces):
            start = time.perf_counter()
            copy_serially(piece, self._source)
            self.num_bytes += self._source.nbytes
            if self._stop.wait(_REST * (time.perf_counter() - start)):
                return


def cast_beside() -> float:
    """Seconds that products lose for each stored byte of bfloat16 cast beside them."""
    x = torch.randn(_ROWS, _SHAPE[0])
    weights = itertools.cycle([torch.randn(_SHAPE[::-1]) for _ in range(4)])
    source = torch.zeros(2 << 20, dtype=torch.bfloat16)
    pieces = torch.split(torch.zeros(32 << 20), len(source))
    _rate(x, weights)
    found = []
    for _ in range(_ROUNDS):
        before = _rate(x, weights)
        start = time.perf_counter()
        with _Caster(source, pieces) as caster:
            beside = _rate(x, weights)
        seconds = time.perf_counter() - start
        alone = max(before, _rate(x, weights))  # what disturbs makes it only slower
        found.append(max(0.0, 1.0 - beside / alone) * seconds / caster.num_bytes)
    return statistics.median(found)


def _rate(x: torch.Tensor, weights: Iterator[torch.Tensor]) -> float:
    """Products a second."""
    start = now = time.perf_counter()
    num = 0
    while now < start + _ROUND_SECONDS:
        functional.linear(x, next(weights))
        num += 1
        now = time.perf_counter()
    return num / (now - start)

"""Measures the rates of matrix products and attention.

They are measured repeatedly, between other measurements. On a shared host, no moment is
like the next, and a job sees the mean of many moments.
"""

import itertools
import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial

import torch
from torch.nn import functional

from .measure import seconds_of

ROWS = (1, 4, 16, 64, 128, 256, 512, 1024)
LENGTHS = (32, 128, 512, 1024)
_HOST_ROWS = (1, 4, 16, 64, 256)
_IN, _OUT = 2048, 5632
_NUM_WEIGHTS = 4  # used in turns, so that none of them is in a cache

Rates = dict[int, int]
"""FLOP/s by number of rows, or by length in tokens."""


class Products:
    """Times matrix products and causal attention in one dtype.

    The products are with 2048 x 5632 matrices, for several numbers of rows. The
    attention has 16 heads of 64, for several lengths; masked products are counted.
    `rows` and `lengths` are `ROWS` and `LENGTHS` if they are not given.
    """

    def __init__(
        self,
        dtype: torch.dtype,
        device: str,
        wait: Callable[[], None],
        rows: Sequence[int] | None = None,
        lengths: Sequence[int] | None = None,
    ) -> None:
        self._dtype = dtype
        self._device = device
        self._wait = wait
        self._weights = [self._random(_OUT, _IN) for _ in range(_NUM_WEIGHTS)]
        self._products: dict[int, list[float]] = {
            num: [] for num in (ROWS if rows is None else rows)
        }
        self._attention: dict[int, list[float]] = {
            length: [] for length in (LENGTHS if lengths is None else lengths)
        }

    def look(self) -> float:
        """Measures each product and attention once. Returns the seconds that this
        took."""
        start = time.perf_counter()
        for rows, seconds in self._products.items():
            x, weights = self._random(rows, _IN), itertools.cycle(self._weights)
            seconds.append(self._seconds_of(partial(_product, x, weights)))
        attend = partial(functional.scaled_dot_product_attention, is_causal=True)
        for length, seconds in self._attention.items():
            q, k, v = (self._random(*_shape(length)) for _ in range(3))
            seconds.append(self._seconds_of(partial(attend, q, k, v)))
        return time.perf_counter() - start

    def usual(self) -> tuple[Rates, Rates]:
        """The rates of products and of attention, each the mean of all measurements."""
        return (
            _rising(self._products, lambda rows: 2 * rows * _IN * _OUT),
            {
                length: round(
                    4 * math.prod(_shape(length)) * length / statistics.mean(seconds)
                )
                for length, seconds in self._attention.items()
            },
        )

    def _random(self, *shape: int) -> torch.Tensor:
        return torch.randn(shape, device=self._device).to(self._dtype)

    def _seconds_of(self, act: Callable[[], torch.Tensor]) -> float:
        return seconds_of(act, wait=self._wait, least=1, most=2)


def host_products(dtype: torch.dtype) -> Rates:
    """FLOP/s of the CPU's products by rows, as many as an expert may get there."""
    products = Products(dtype, "cpu", lambda: None, _HOST_ROWS, ())
    products.look()
    return products.usual()[0]


def _rising(
    seconds: Mapping[int, Sequence[float]], flops: Callable[[int], int]
) -> Rates:
    """FLOP/s by rows. More rows never have a lower rate: only a disturbed run would
    show that."""
    found: Rates = {}
    for rows, looks in seconds.items():
        found[rows] = max(
            [round(flops(rows) / statistics.mean(looks)), *found.values()]
        )
    return found


def _shape(length: int) -> tuple[int, int, int, int]:
    """The shape [batch, heads, tokens, dim] of attention, with at least 1,024 tokens in
    all."""
    return max(1, 1024 // length), 16, length, 64


def _product(x: torch.Tensor, weights: Iterator[torch.Tensor]) -> torch.Tensor:
    return functional.linear(x, next(weights))

"""Measures the operations of a block that are between its matrix products.

Small models run jobs. One clock runs all the time, and stops during matrix products and
attention. What it shows is the time of the rest. Subtracting times of products that
were measured at another moment would not do: on a shared host, moments differ.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

from torch.nn import functional

from .measure_calls import (
    MODULES_OF_BLOCK,
    Block,
    TwoDepths,
    generate_seconds,
    jobs_policy,
    score_seconds,
    two_depths,
)
from .rounds import rounds

_LARGE = Block(hidden=1024, intermediate=2816, heads=16)
_ROWS, _LENGTH, _BATCHES = 4, 128, 2
_MIDDLE = Block(hidden=512, intermediate=1408, heads=8)
_FEW_ROWS, _MANY_ROWS, _DECODING = 4, 32, 8
_NUM_STEPS = 5


@dataclass(frozen=True, slots=True)
class Between:
    """What is measured here. Rates are bytes per second, or None if the time was too
    short to measure."""

    pointwise: int | None
    """The rate of a block's operations between matrix products, in scoring."""
    decode: int | None
    """The same rate for a micro-batch of a few rows in decode, if matrix products are
    shared."""
    joint_module: float
    """Seconds of one module for one micro-batch in decode whose matrix products are
    shared, whatever the number of its rows."""
    kv_layer: float
    """Seconds to store and fetch the keys and values of one layer of a micro-batch in
    decode, if a tier keeps them."""
    first_touch: float
    """Seconds to fill one byte of the working set for the first time, beyond reading
    it."""


def measure_between(
    device: str, cache: Path, module_seconds: float, wait: Callable[[], None]
) -> Between:
    """Measures this computer. A module with weights costs `module_seconds` in scoring.
    Writes small models into the folder `cache`."""
    scored, touch = _scored(device, cache, wait)
    module, kv_layer, row = _decoded(device, cache, wait)
    return Between(
        _rate(_LARGE, _ROWS * _LENGTH, scored - MODULES_OF_BLOCK * module_seconds),
        _rate(_MIDDLE, 1, row),
        module,
        kv_layer,
        touch,
    )


class RestClock:
    """Counts seconds since it was made, except those of the calls by `leave_out`."""

    def __init__(self, wait: Callable[[], None]) -> None:
        self._wait = wait
        self._start = time.perf_counter()
        self._not_counted = 0.0

    @property
    def seconds(self) -> float:
        return time.perf_counter() - self._start - self._not_counted

    def leave_out(self, act: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        self._wait()
        start = time.perf_counter()
        try:
            return act(*args, **kwargs)
        finally:
            self._wait()
            self._not_counted += time.perf_counter() - start


@contextmanager
def rest_clock(wait: Callable[[], None], *names: str) -> Iterator[RestClock]:
    """Gives a clock that stops during the functions `names` of torch.nn.functional.

    They are replaced by wrappers meanwhile.
    """
    own = {name: getattr(functional, name) for name in names}
    clock = RestClock(wait)
    for name, function in own.items():
        setattr(functional, name, partial(clock.leave_out, function))
    try:
        yield clock
    finally:
        for name, function in own.items():
            setattr(functional, name, function)


def _scored(device: str, cache: Path, wait: Callable[[], None]) -> tuple[float, float]:
    """The seconds between the matrix products of a block, for one micro-batch that is
    scored, and the seconds of the first touch of a byte."""
    tokens = _ROWS * _LENGTH
    policy = jobs_policy(
        device, cache, micro_batch_tokens=tokens, tokens_in_flight=tokens * _BATCHES
    )
    run = partial(score_seconds, num_rows=_ROWS * _BATCHES, length=_LENGTH)

    def rest(model: Any) -> float:
        with rest_clock(wait, "linear", "scaled_dot_product_attention") as clock:
            run(model)
            return clock.seconds / _BATCHES

    with two_depths(_LARGE, policy, deep=3) as models:
        touch = _first_touch(models, run)
        return models.per_block(rest), touch


def _first_touch(models: TwoDepths, run: Callable[[Any], float]) -> float:
    """The seconds of the first touch of a byte: how much longer the first job takes
    than the second one, for each byte that the deeper model has more."""
    first = run(models.deep) - run(models.shallow)
    later = run(models.deep) - run(models.shallow)
    weights = _LARGE.hidden * (4 * _LARGE.hidden + 3 * _LARGE.intermediate)
    return max(0.0, first - later) / (4 * models.num_more * weights)


def _decoded(
    device: str, cache: Path, wait: Callable[[], None]
) -> tuple[float, float, float]:
    """Seconds of one micro-batch in decode: of one module, of the keys and values of
    one layer in a tier, and of the operations between a block's matrix products for one
    row. The last include attention."""

    def rest(model: Any, each: int) -> float:
        with rest_clock(wait, "linear") as clock:
            generate_seconds(model, each * _DECODING, _NUM_STEPS)
            return clock.seconds / _NUM_STEPS / _DECODING

    ways = (_FEW_ROWS, "auto"), (_FEW_ROWS, "host"), (_MANY_ROWS, "auto")
    with ExitStack() as opened:
        blocks = []
        for each, tier in ways:
            settings = {
                "micro_batch_sequences": each,
                "sequences_in_flight": each * _DECODING,
                "kv": {"tier": tier},
            }
            policy = jobs_policy(device, cache, **settings)
            models = opened.enter_context(two_depths(_MIDDLE, policy, deep=3))
            rest(models.deep, each)  # warms up
            blocks.append(partial(models.once, partial(rest, each=each)))
        found = [[block() for block in blocks] for _ in rounds()]
    more = _MANY_ROWS - _FEW_ROWS
    row = max(0.0, median((many - few) / more for few, _, many in found))
    module = median(few for few, *_ in found) - _FEW_ROWS * row
    kv_layer = median(kept - few for few, kept, _ in found)
    return max(0.0, module) / MODULES_OF_BLOCK, max(0.0, kv_layer), row


def _rate(block: Block, tokens: int, seconds: float) -> int | None:
    elements = pointwise_elements(block.hidden, block.intermediate)
    return round(4 * tokens * elements / seconds) if seconds > 0 else None


def pointwise_elements(hidden: int, intermediate: int) -> float:
    """How many elements the operations between matrix products touch for one token, in
    a block of Llama. Counts as `describe` does."""
    from ..units.describe import TOUCHES_OF_NORM, TOUCHES_OF_PRODUCT

    products = 5 * hidden + 2 * intermediate
    return 2 * TOUCHES_OF_NORM * hidden + TOUCHES_OF_PRODUCT * products

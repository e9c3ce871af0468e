"""What `penstock machine` does: measures this computer, part by part, and says so."""

import re
import tempfile
from collections.abc import Callable
from datetime import datetime
from pathlib import Path

import torch

from ...io.errors import UsageError
from ...scheduler.rates import Curve
from ..policy import IO, cache_folder
from ..tiers import open_device
from . import measure
from .machine import Calls, Copies, Machine
from .measure_beside import cast_beside
from .measure_calls import (
    DECODE_ROWS,
    DECODE_ROWS_EACH,
    LARGE,
    MODULES_OF_BLOCK,
    block_seconds,
    calls,
    decode_block_seconds,
)
from .measure_gpu import gpu_facts, measure_copies
from .measure_products import Products, Rates

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
_LONG_LOOK = 3.0
"""Seconds: a look that takes longer has seen several moments by itself."""
_ROWS, _LENGTH = 4, 128
_FLOPS = 2.0 * LARGE.hidden * (4 * LARGE.hidden + 3 * LARGE.intermediate)
"""Of a token in a block of it."""


def measure_machine(
    place: Path, io: IO, progress: Callable[[str], None], *, device: str = "cpu"
) -> Machine:
    """The rates of this computer, computing on `device`, with the drive of `place` (a
    folder to write a scratch file into, or a file). Takes less than a minute. Raises
    OSError where the scratch file cannot be written."""
    is_gpu = device != "cpu"
    wait = torch.cuda.synchronize if is_gpu else _no_wait
    progress("products and attention, now and between all that follows")
    products = {name: Products(dtype, device, wait) for name, dtype in _DTYPES.items()}
    took = {name: each.look() for name, each in products.items()}
    computing = products["float32"]
    progress("reading the drive")
    disk = measure.disk(place, io, progress)
    computing.look()
    progress("the memory")
    host = measure.memory_bandwidth("cpu", _no_wait)
    cast = measure.cast_bandwidth()
    product = measure.product_seconds(device, wait)
    cache = cache_folder(io)
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache, prefix="measure-") as folder:
        progress("small models, for what calls take")
        found = calls(device, Path(folder), product)
        computing.look()
        progress("a larger model, for what is between products")
        block, touch = block_seconds(LARGE, _ROWS, _LENGTH, device, Path(folder))
        beside = cast_beside() if device == "cpu" else 0.0
        computing.look()
        decode = decode_block_seconds(LARGE, device, Path(folder))
        for name, each in products.items():
            if took[name] < _LONG_LOOK:
                each.look()
    # Models are measured at their best, so what is between products is told by the best
    # of these; all of it is as much slower usually as they are.
    slowdown = computing.slowdown
    rates, attention = map(Curve.of, computing.best())
    pointwise = pointwise_bandwidth(block, rates, attention, found)
    few_rows = decode_bandwidth(decode, rates, found)
    found = Calls(
        **{name: value * slowdown for name, value in found.model_dump().items()}
        | {
            "first_touch_per_gb": touch * 1e9 * slowdown,
            "cast_per_gb": beside * 1e9,
        }
    )
    between = {
        "pointwise_bandwidth": _slower(pointwise, slowdown),
        "decode_bandwidth": _slower(few_rows, slowdown),
        "cast_bandwidth": cast,
    }
    copies = None
    gpu: dict[str, object] = {}
    if is_gpu:
        progress("copies to and from the GPU")
        gpu = dict(gpu_facts(device))
        gpu["device_bandwidth"] = measure.memory_bandwidth(device, wait)
        copies = measure_copies(device)
    usual = {name: each.usual() for name, each in products.items()}
    return _machine(disk, host, usual, found, copies, gpu, between)


def _slower(rate: int | None, slowdown: float) -> int | None:
    return None if rate is None else round(rate / slowdown)


def check_measurable(place: Path, device: str) -> None:
    """Before a second is spent: raises UsageError where `place` is nothing that can be
    read, PolicyError where there is no such `device`."""
    if not place.exists():
        raise UsageError(f"{place}: there is no such folder or file on a drive")
    if device == "cpu":
        return
    if re.fullmatch(r"cuda(:\d+)?", device) is None:
        raise UsageError(f"nothing computes on {device!r}: write cpu, cuda or cuda:1")
    open_device(device)


def pointwise_bandwidth(
    block: float, matmul: Curve, attention: Curve, costs: Calls
) -> int | None:
    """Bytes a second that the operations of a block of `LARGE` touch between its
    products, where all of it takes `block` seconds: what products, attention and calls
    do not explain. None where they explain all."""
    tokens, size = _ROWS * _LENGTH, LARGE.hidden
    rest = block - tokens * _FLOPS / matmul.at(tokens)
    rest -= 4.0 * size * tokens * _LENGTH / attention.at(_LENGTH)
    rest -= MODULES_OF_BLOCK * costs.module + 7 * costs.product
    touched = 4 * tokens * pointwise_elements(size, LARGE.intermediate)
    return round(touched / rest) if rest > 0 else None


def decode_bandwidth(block: float, matmul: Curve, costs: Calls) -> int | None:
    """The same in decode, where a block takes `block` seconds for each micro-batch."""
    num_batches = DECODE_ROWS // DECODE_ROWS_EACH
    products = DECODE_ROWS * _FLOPS / matmul.at(DECODE_ROWS) + 7 * costs.product
    rest = block - products / num_batches - MODULES_OF_BLOCK * costs.joint_module
    touched = 4 * pointwise_elements(LARGE.hidden, LARGE.intermediate)
    return round(DECODE_ROWS_EACH * touched / rest) if rest > 0 else None


def pointwise_elements(hidden: int, intermediate: int) -> float:
    """Of one token in a block of Llama, counted as `describe` counts them."""
    from ..units.describe import TOUCHES_OF_NORM, TOUCHES_OF_PRODUCT

    products = 5 * hidden + 2 * intermediate
    return 2 * TOUCHES_OF_NORM * hidden + TOUCHES_OF_PRODUCT * products


def _machine(
    disk: object,
    host: int,
    usual: dict[str, tuple[Rates, Rates]],
    found: Calls,
    copies: Copies | None,
    gpu: dict[str, object],
    between: dict[str, int | None],
) -> Machine:
    facts = measure.host_facts()
    date = datetime.now().date().isoformat()
    versions = f"torch {torch.__version__}"
    values = {
        "name": f"{measure.cpu_name()}, {facts['cores']} cores",
        "source": f"measured by penstock machine on {date}, {versions}",
        **facts,
        "host_bandwidth": host,
        "matmul": {name: products for name, (products, _) in usual.items()},
        "attention": {name: attention for name, (_, attention) in usual.items()},
        **between,
        "disk": disk,
        "copies": copies,
        "calls": found,
        **gpu,
    }
    return Machine(**values)


def _no_wait() -> None:
    pass

"""What `penstock machine` does: measures this computer, part by part, and says so."""

import tempfile
from collections.abc import Callable
from datetime import datetime
from pathlib import Path

import torch

from . import measure
from .machine import Calls, Copies, Machine
from .measure_calls import LARGE, MODULES_OF_BLOCK, block_seconds, calls
from .measure_gpu import gpu_facts, measure_copies
from .policy import IO, cache_folder

_ROWS, _LENGTH = 4, 128


def measure_machine(
    place: Path, io: IO, progress: Callable[[str], None], *, device: str = "cpu"
) -> Machine:
    """The rates of this computer, computing on `device`, with the drive of `place` (a
    folder to write a scratch file into, or a file). Takes less than a minute. Raises
    OSError where the scratch file cannot be written."""
    is_gpu = device != "cpu"
    wait = torch.cuda.synchronize if is_gpu else _no_wait
    progress("reading the drive")
    disk = measure.disk(place, io, progress)
    progress("the memory")
    host = measure.memory_bandwidth("cpu", _no_wait)
    cast = measure.cast_bandwidth()
    matmul, attention = {}, {}
    for dtype in (torch.float32, torch.bfloat16):
        name = str(dtype).removeprefix("torch.")
        progress(f"products in {name}")
        matmul[name] = measure.matmul(dtype, device, wait)
        progress(f"attention in {name}")
        attention[name] = measure.attention(dtype, device, wait)
    product = measure.product_seconds(device, wait)
    cache = cache_folder(io)
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache, prefix="measure-") as folder:
        progress("small models, for what calls take")
        found = calls(device, Path(folder), product)
        progress("a larger model, for what is between products")
        block = block_seconds(LARGE, _ROWS, _LENGTH, device, Path(folder))
    pointwise = pointwise_bandwidth(
        block, matmul["float32"], attention["float32"], found
    )
    copies = None
    gpu: dict[str, object] = {}
    if is_gpu:
        progress("copies to and from the GPU")
        gpu = dict(gpu_facts(device))
        gpu["device_bandwidth"] = measure.memory_bandwidth(device, wait)
        copies = measure_copies(device)
    return _machine(disk, host, cast, matmul, attention, pointwise, found, copies, gpu)


def pointwise_bandwidth(
    block: float, matmul: dict[int, int], attention: dict[int, int], costs: Calls
) -> int | None:
    """Bytes a second that the operations of a block of `LARGE` touch between its
    products, where all of it takes `block` seconds: what products, attention and calls
    do not explain. None where they explain all."""
    from ..scheduler.rates import Curve

    tokens, size = _ROWS * _LENGTH, LARGE.hidden
    flops = 2.0 * tokens * (4 * size * size + 3 * size * LARGE.intermediate)
    rest = block - flops / Curve.of(matmul).at(tokens)
    rest -= 4.0 * size * tokens * _LENGTH / Curve.of(attention).at(_LENGTH)
    rest -= MODULES_OF_BLOCK * costs.module + 7 * costs.product
    touched = 4 * tokens * pointwise_elements(size, LARGE.intermediate)
    return round(touched / rest) if rest > 0 else None


def pointwise_elements(hidden: int, intermediate: int) -> float:
    """Of one token in a block of Llama, counted as `describe` counts them."""
    from .describe import TOUCHES_OF_NORM, TOUCHES_OF_PRODUCT

    products = 5 * hidden + 2 * intermediate
    return 2 * TOUCHES_OF_NORM * hidden + TOUCHES_OF_PRODUCT * products


def _machine(
    disk: object,
    host: int,
    cast: int,
    matmul: dict[str, dict[int, int]],
    attention: dict[str, dict[int, int]],
    pointwise: int | None,
    found: Calls,
    copies: Copies | None,
    gpu: dict[str, object],
) -> Machine:
    facts = measure.host_facts()
    date = datetime.now().date().isoformat()
    versions = f"torch {torch.__version__}"
    values = {
        "name": f"{measure.cpu_name()}, {facts['cores']} cores",
        "source": f"measured by penstock machine on {date}, {versions}",
        **facts,
        "host_bandwidth": host,
        "matmul": matmul,
        "attention": attention,
        "pointwise_bandwidth": pointwise,
        "cast_bandwidth": cast,
        "disk": disk,
        "copies": copies,
        "calls": found,
        **gpu,
    }
    return Machine(**values)


def _no_wait() -> None:
    pass

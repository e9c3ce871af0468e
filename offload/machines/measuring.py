"""Measures this computer, part by part, for `penstock machine`."""

import tempfile
from collections.abc import Callable
from datetime import datetime
from functools import partial
from pathlib import Path

import torch

from ...io.devices.opening import open_device
from ...io.errors import UsageError
from ..policy import IO, cache_folder
from . import measure
from .machine import Calls, Copies, Machine
from .measure_beside import cast_beside
from .measure_between import Between, measure_between
from .measure_calls import calls
from .measure_decoding import decoding_bandwidth
from .measure_gpu import copied_bytes, gpu_facts, measure_copies
from .measure_products import Products, Rates, host_products

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
_LONG_LOOK = 3.0
"""Seconds. Measurements of products that took longer than this are not repeated at the
end: they covered several moments already."""


def measure_machine(
    place: Path, io: IO, progress: Callable[[str], None], *, device: str = "cpu"
) -> Machine:
    """Measures the rates of this computer, in less than a minute.

    Computes on `device`. Measures the drive of `place`, a folder in which a scratch
    file is written, or a file. `progress` is called with a line for each part. Raises
    OSError if the scratch file cannot be written.
    """
    is_gpu = device != "cpu"
    wait = partial(torch.accelerator.synchronize, device) if is_gpu else _no_wait
    progress("products and attention, now and between all that follows")
    products = {name: Products(dtype, device, wait) for name, dtype in _DTYPES.items()}
    took = {name: each.look() for name, each in products.items()}
    beside_gpu: dict[str, Rates] = {}
    if is_gpu:
        beside_gpu = {name: host_products(dtype) for name, dtype in _DTYPES.items()}
    computing = products["float32"]
    progress("reading the drive")
    disk = measure.disk(place, io, progress)
    computing.look()
    progress("the memory")
    host = measure.memory_bandwidth("cpu", _no_wait)
    cast = measure.cast_bandwidth()
    cache = cache_folder(io)
    cache.mkdir(parents=True, exist_ok=True)
    decoding = decoding_bandwidth(cache)
    product = measure.product_seconds(device, wait)
    with tempfile.TemporaryDirectory(dir=cache, prefix="measure-") as folder:
        progress("small models, for what calls take")
        found = calls(device, Path(folder), product)
        computing.look()
        progress("a larger model, for what is between products")
        between = measure_between(device, Path(folder), found.module, wait)
        computing.look()
        beside = cast_beside(Path(folder)) if device == "cpu" else 0.0
        for name, each in products.items():
            if took[name] < _LONG_LOOK:
                each.look()
    found = found.model_copy(
        update={
            "joint_module": between.joint_module,
            "kv_layer": between.kv_layer,
            "first_touch_per_gb": between.first_touch * 1e9,
            "cast_per_gb": beside * 1e9,
        }
    )
    copies = None
    gpu: dict[str, object] = {}
    if is_gpu:
        progress("copies to and from the GPU")
        gpu = {**gpu_facts(device), "host_matmul": beside_gpu}
        gpu["device_bandwidth"] = measure.memory_bandwidth(
            device, wait, copied_bytes(device)
        )
        copies = measure_copies(device)
    usual = {name: each.usual() for name, each in products.items()}
    return _machine(disk, host, usual, found, copies, gpu, cast, decoding, between)


def check_measurable(place: Path, device: str) -> None:
    """Checks the arguments before anything is measured.

    Raises UsageError if `place` does not exist, and PolicyError if this computer does
    not have the device `device`.
    """
    if not place.exists():
        raise UsageError(f"{place}: there is no such folder or file on a drive")
    if device == "cpu":
        return
    open_device(device)


def _machine(
    disk: object,
    host: int,
    usual: dict[str, tuple[Rates, Rates]],
    found: Calls,
    copies: Copies | None,
    gpu: dict[str, object],
    cast: int,
    decoding: dict[str, int],
    between: Between,
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
        "pointwise_bandwidth": between.pointwise,
        "decode_bandwidth": between.decode,
        "cast_bandwidth": cast,
        "decoding": decoding,
        "disk": disk,
        "copies": copies,
        "calls": found,
        **gpu,
    }
    return Machine(**values)


def _no_wait() -> None:
    pass

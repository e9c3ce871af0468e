"""Estimates the rates of this computer in about a second, if there is no machine
file."""

import itertools
import json
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional

from ...io.checkpoint.header import FileStamp
from ...io.extent import Extent, align_down, align_up
from ...io.fallbacks import Fallbacks
from ...io.memory.arena import Arena
from ...io.readers.choice import drive_of
from ..engine.readers import makers_of
from ..files.durable import DurableFiles as Files
from ..files.durable import write_whole
from ..policy import IO, cache_folder
from .machine import Calls, Disk, Machine
from .measure import cpu_name, disk_sizes, host_facts, scratch_file, seconds_of

DAY = 24 * 3600.0
"""How many seconds an estimate is remembered. Other load on the machine changes it."""
_ROWS = (8, 64, 512)
_SIZE = 1024
_NUM_WEIGHTS = 4  # used in turns, so that none of them is in a cache
_COPIED_BYTES = 64 << 20
_READ_BYTES = 64 << 20
_FILE = "estimates.json"

# The time of calls, in multiples of the smallest matrix product. They are guesses of
# the order of magnitude, and matter only to tiny models and narrow decoding. `penstock
# machine` measures the real values.
_MODULE_PRODUCTS = 3.0
_BATCH_PRODUCTS = 60.0
_JOINT_MODULE_PRODUCTS = 6.0
_STEP_PRODUCTS = 100.0


def estimated_machine(
    dtypes: Iterable[str],
    files: Mapping[Path, FileStamp],
    io: IO,
    *,
    clock: Callable[[], float] = time.time,
) -> Machine:
    """Estimates the rates of this computer.

    `dtypes` (float32, bfloat16, float16) are those of the matrix products. `files` are
    the weight files of a checkpoint: up to 64 MiB of them are read to time the drive.
    Without files, the drive of the cache folder is timed.

    Estimates of the last day are taken from `estimates.json` in the cache folder. The
    result has `is_estimate` set. Raises OSError if the drive cannot be read.
    """
    known = RememberedEstimates(cache_folder(io) / _FILE, clock)
    began = time.perf_counter()
    matmul = {name: _products_of(name, known) for name in dtypes}
    memory = known.get_or("memory", _memory)
    disk = _disk_of(files, io, known)
    seconds = time.perf_counter() - began
    known.keep()
    return Machine(
        name=f"{cpu_name()}, {host_facts()['cores']} cores",
        source=_source(seconds, known.num_new),
        is_estimate=True,
        **host_facts(),
        host_bandwidth=memory["bytes_per_second"],
        matmul=matmul,
        cast_bandwidth=memory["cast_bytes_per_second"],
        disk=disk,
        calls=_calls(memory["product_seconds"]),
    )


class RememberedEstimates:
    """Estimates of this computer and their times, in a JSON file.

    The file may be deleted at any time and need not be writable. `clock` gives seconds
    since 1970.
    """

    def __init__(self, path: Path, clock: Callable[[], float]) -> None:
        self._path = path
        self._clock = clock
        self._values = self._read()
        self.num_new = 0
        """How many estimates were made, not remembered."""

    def get_or(self, key: str, make: Callable[[], Any]) -> Any:
        """The estimate `key` of this computer. Calls `make` if it is unknown or older
        than a day."""
        key = f"{_computer()}, {key}"
        found: Any = self._values.get(key)
        is_known = isinstance(found, dict) and "value" in found
        if is_known and self._is_fresh(found.get("at")):
            return found["value"]
        value = make()
        self._values[key] = {"at": self._clock(), "value": value}
        self.num_new += 1
        return value

    def keep(self) -> None:
        """Writes the file if there are new estimates. Does nothing if it cannot be
        written."""
        if not self.num_new:
            return
        says = "Quick estimates, remembered for a day; `penstock machine` measures."
        text = json.dumps({"what": says, **self._values}, indent=1).encode() + b"\n"
        with suppress(OSError):
            self._path.parent.mkdir(parents=True, exist_ok=True)
            write_whole(Files(), self._path, [text])

    def _read(self) -> dict[str, Any]:
        try:
            found = json.loads(self._path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}
        return found if isinstance(found, dict) else {}

    def _is_fresh(self, at: object) -> bool:
        return isinstance(at, (int, float)) and 0 <= self._clock() - at < DAY


def _computer() -> str:
    threads = torch.get_num_threads()
    return f"{cpu_name()}, {threads} threads, torch {torch.__version__}"


def _source(seconds: float, num_new: int) -> str:
    when = f"measured in {seconds:.1f} s" if num_new else "of the last 24 hours"
    return f"quick estimate, {when}; `penstock machine` measures properly"


def _products_of(dtype: str, known: RememberedEstimates) -> dict[int, int]:
    made = known.get_or(f"products in {dtype}", partial(_products, dtype))
    return {int(rows): flops for rows, flops in made.items()}


def _products(dtype: str) -> dict[str, int]:
    """FLOP/s by number of rows, of products with a 1024 x 1024 matrix. More rows never
    have a lower rate."""
    kind = getattr(torch, dtype)
    weights = [torch.randn(_SIZE, _SIZE).to(kind) for _ in range(_NUM_WEIGHTS)]
    found: dict[str, int] = {}
    for rows in _ROWS:
        x, turns = torch.randn(rows, _SIZE).to(kind), itertools.cycle(weights)
        seconds = seconds_of(partial(_product, x, turns), least=1, most=3)
        flops = round(2 * rows * _SIZE * _SIZE / seconds)
        found[str(rows)] = max([flops, *found.values()])
    return found


def _product(x: torch.Tensor, weights: "itertools.cycle[torch.Tensor]") -> torch.Tensor:
    return functional.linear(x, next(weights))


def _memory() -> dict[str, float]:
    """The rates of memory: bytes read and written in a second by a copy, stored bytes
    in a second of a bfloat16 cast for each thread, and the seconds of the smallest
    product."""
    source = torch.zeros(_COPIED_BYTES // 4)
    target = torch.zeros_like(source)
    copied = seconds_of(lambda: target.copy_(source), least=2, most=4)
    half = source[: len(source) // 8].to(torch.bfloat16)
    wide = target[: len(half)]
    cast = seconds_of(lambda: wide.copy_(half), least=2, most=4)
    return {
        "bytes_per_second": round(2 * source.nbytes / copied),
        "cast_bytes_per_second": round(half.nbytes / cast / torch.get_num_threads()),
        "product_seconds": seconds_of(_smallest_product, least=20, most=50),
    }


def _smallest_product() -> torch.Tensor:
    return functional.linear(torch.ones(8, 64), torch.ones(64, 64))


def _calls(product: float) -> Calls:
    """The seconds of calls, as multiples of the smallest matrix product (`product`
    seconds)."""
    return Calls(
        product=product,
        module=_MODULE_PRODUCTS * product,
        batch=_BATCH_PRODUCTS * product,
        joint_module=_JOINT_MODULE_PRODUCTS * product,
        decode_module=_MODULE_PRODUCTS * product,
        step=_STEP_PRODUCTS * product,
    )


def _disk_of(
    files: Mapping[Path, FileStamp], io: IO, known: RememberedEstimates
) -> Disk:
    if files:
        path = max(files, key=lambda path: files[path].size_bytes)
        key = f"drive {drive_of(path)}, {_settings(io)}"
        found = known.get_or(key, lambda: _drive(path, files, io))
    else:
        folder = cache_folder(io)
        key = f"drive {drive_of(folder)}, {_settings(io)}"
        found = known.get_or(key, lambda: _scratch_drive(folder, io))
    return Disk(**{**found, **disk_sizes(cache_folder(io))})


def _settings(io: IO) -> str:
    return f"threads {io.threads}, depth {io.depth}, chunk {io.chunk}"


def _scratch_drive(folder: Path, io: IO) -> dict[str, Any]:
    folder.mkdir(parents=True, exist_ok=True)
    with scratch_file(folder, _READ_BYTES) as path:
        return _drive(path, {path: FileStamp.of(path.stat())}, io)


def _drive(path: Path, files: Mapping[Path, FileStamp], io: IO) -> dict[str, Any]:
    """The rate of the first available reader, as the fields of a `Disk`. The other
    readers are about as fast; `auto` finds out which is the best."""
    makers, missing = makers_of(files, io, Fallbacks())
    name = next(name for name in makers if name not in missing)
    with makers[name]() as reader:
        size = min(files[path].size_bytes, _READ_BYTES)
        half = align_down(size // 2, reader.alignment) or size
        # The first half was read only to touch the buffer.
        start = align_down(size - half, reader.alignment)
        with Arena(align_up(half, reader.alignment)) as arena:
            _read(reader, Extent(path, 0, half), arena)
            began, used = time.perf_counter(), time.process_time()
            _read(reader, Extent(path, start, half), arena)
            seconds = max(time.perf_counter() - began, 1e-6)
            cpu = time.process_time() - used
    return {
        "bandwidth": {name: round(half / seconds)},
        "cpu_seconds_per_gb": {name: cpu / half * 1e9},
    }


def _read(reader: Any, extent: Extent, arena: Arena) -> None:
    view = arena.view(0, arena.nbytes)
    reader.submit(extent, view).wait()
    view.release()

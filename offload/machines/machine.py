"""The rates of a computer, measured or published, in a file that people read and
edit."""

from pathlib import Path
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import Field, PositiveFloat, PositiveInt, ValidationError

from ...io.errors import PolicyError
from ..settings.extends import read_text
from ..settings.marked_yaml import read_value
from ..settings.user_cache import kept_file, user_cache
from ..settings.values import Bytes, Section

Dtype = Literal["float32", "bfloat16", "float16"]
PerRows = dict[PositiveInt, PositiveFloat]

_SHIPPED = Path(__file__).parent


class Disk(Section):
    """The drive that checkpoints lie on."""

    bandwidth: dict[str, Bytes]
    """Bytes per second of long reads, by reader (libaio, threads, aiofiles, gds)."""
    cpu_seconds_per_gb: dict[str, float] = Field(default_factory=dict)
    """CPU seconds to read 10**9 bytes, by reader."""
    capacity: Bytes | None = None
    """Bytes of the drive's file system, all of it."""
    free: Bytes | None = None
    """Bytes of it that were free, where keys and values may go; None: not measured."""
    row_read_seconds: float = 0.0
    """Seconds for one short read if many are requested at once, such as rows of an
    embedding table."""

    @property
    def best_reader(self) -> str:
        return max(self.bandwidth, key=lambda reader: self.bandwidth[reader])


class Copies(Section):
    """Bandwidths in bytes per second between host memory and one GPU."""

    pinned_to_device: Bytes
    pinned_to_host: Bytes
    both_ways: Bytes | None = None
    """Bytes per second in each direction, from and to pinned memory, while the other
    direction is busy."""
    pageable_to_device: Bytes | None = None
    pageable_to_host: Bytes | None = None
    peer: Bytes | None = None
    """Bytes per second from the memory of another GPU."""


class Calls(Section):
    """Seconds of overhead: Python, hooks, and switches between micro-batches. A value
    is 0 if it was not measured; predictions are then upper limits of the speed."""

    job: float = 0.0
    """Seconds at the start of a job, before its first pass."""
    first_touch_per_gb: float = 0.0
    """Seconds to fill 10**9 bytes of the working set for the first time, beyond the
    time of reading them."""
    cast_per_gb: float = 0.0
    """Seconds that the CPU's computation loses for each 10**9 stored bytes that are
    cast at the same time. If it is 0, casting is assumed to take a share of the
    cores."""
    product: float = 0.0
    """Seconds of one matrix product, whatever its size."""
    module: float = 0.0
    """Seconds of one module with weights, for one micro-batch that is scored."""
    batch: float = 0.0
    """Seconds of one micro-batch that is scored, outside of its modules."""
    joint_module: float = 0.0
    """Seconds of one module for one micro-batch in decode, if micro-batches share
    matrix products."""
    decode_module: float = 0.0
    """The same, if they do not share matrix products."""
    kv_layer: float = 0.0
    """Seconds to store and fetch the keys and values of one layer of a micro-batch in a
    tier (`kv.tier`)."""
    step: float = 0.0
    """Seconds of one decoding step of a micro-batch (one token for each row), outside
    of its modules."""


class Machine(Section):
    """The rates of one computer. Rates are per second and for one device. Sizes and
    bytes per second are numbers or strings such as 24GiB and 1.4GB."""

    name: str
    source: str
    """Where the numbers come from."""
    is_estimate: bool = False
    """Whether the rates are quick estimates, made in a second or two."""
    device: Annotated[str, Field(pattern=r"^[a-z][a-z0-9_]*$")] = "cpu"
    """The kind of the device that computes: `cpu`, `cuda`, another kind that torch
    knows, or `tpu`."""
    num_devices: PositiveInt = 1
    """The number of these devices."""
    num_threads: Annotated[int, Field(ge=0)] = 0
    """The number of threads that compute, on a CPU."""
    cores: PositiveInt = 1
    """The number of physical cores of the CPU."""
    host_memory: Bytes
    """Bytes of the host's memory, all of it."""
    host_bandwidth: Bytes | None = None
    """Bytes per second that the host's memory reads and writes together."""
    device_memory: Bytes | None = None
    """Bytes of memory of one device. None if the device computes in the host's
    memory."""
    device_bandwidth: Bytes | None = None
    """Bytes per second of the device's own memory."""
    matmul: dict[Dtype, PerRows]
    """FLOP/s of a matrix product, by the number of rows of the smaller matrix."""
    host_matmul: dict[Dtype, PerRows] = Field(default_factory=dict)
    """The same of the CPU beside a GPU, which computes experts that few tokens chose
    (`experts: host` in the policy). Without it, it computes none."""
    attention: dict[Dtype, PerRows] = Field(default_factory=dict)
    """FLOP/s of attention, by the number of tokens of a sequence; masked products are
    counted. Without it, the rate of a matrix product with as many rows is used."""
    pointwise_bandwidth: Bytes | None = None
    """Bytes per second of the operations between a block's matrix products. Without it,
    the device's bandwidth is used."""
    decode_bandwidth: Bytes | None = None
    """The same for a micro-batch in decode, which has few rows, if matrix products are
    shared."""
    cast_bandwidth: Bytes | None = None
    """Stored bytes per second that one thread casts to the dtype of the matrix
    products."""
    decoding: dict[str, Bytes] = Field(default_factory=dict)
    """Stored bytes per second that one thread decodes to the same dtype, by codec
    (`float8_e4m3fn`, `int8`, `int4`, `float4_e2m1`, `lossless`). Without it, those that
    a CPU with AVX2 decodes while it casts as many as `cast_bandwidth` says."""
    disk: Disk | None = None
    """The drive that checkpoints lie on."""
    copies: Copies | None = None
    """Copies to and from one GPU; None on a CPU."""
    network_bandwidth: Bytes | None = None
    """Bytes per second of one device to all its peers together."""
    calls: Calls = Calls()
    """Seconds of overhead of calls."""
    price_per_hour: PositiveFloat | None = None
    """The price of an hour of this computer, in any currency: plans and reports then
    say what a million tokens cost."""

    def __init__(self, **values: Any) -> None:
        try:
            super().__init__(**values)
        except ValidationError as error:
            raise PolicyError(_explain(error)) from None

    @property
    def is_accelerated(self) -> bool:
        """Whether a device other than the CPU computes, which torch can use."""
        return self.device not in ("cpu", "tpu")

    @classmethod
    def from_yaml(cls, path: Path) -> Self:
        """Reads a machine file. Raises PolicyError, which names the file and the
        key."""
        values = read_value(read_text(path), str(path))
        if not isinstance(values, dict):
            raise PolicyError(f"{path} must hold keys and values, not {values!r}")
        try:
            return cls(**{str(key): value for key, value in values.items()})
        except PolicyError as error:
            raise PolicyError(f"{path}: {error}") from None

    def to_yaml(self) -> str:
        """The text of a machine file, with a comment for each key."""
        parts = [f"# {(type(self).__doc__ or '').strip()}".replace("\n    ", "\n# ")]
        for key, field in type(self).model_fields.items():
            value = _plain(getattr(self, key))
            if value is None or value is False or value == {}:
                continue
            comment = " ".join((field.description or "").split())
            text = yaml.safe_dump({key: value}, sort_keys=False, allow_unicode=True)
            parts.append((f"# {comment}\n" if comment else "") + text.rstrip())
        return "\n".join(parts) + "\n"


def check_runs(machine: Machine) -> None:
    """Raises PolicyError for machines that Penstock does not compute on."""
    if machine.device == "tpu":
        raise PolicyError(
            f"machine {machine.name!r} is for the formulas alone: Penstock computes on "
            "CPUs and GPUs; take another machine"
        )
    if machine.disk is None:
        raise PolicyError(
            f"machine {machine.name!r} has no disk to read weights from: give its file "
            "a section disk"
        )


def own_machine_path(cache: Path | None = None) -> Path:
    """The file in which `penstock machine` keeps its measurements, in the folder
    `cache` or the user's cache folder."""
    return (cache or user_cache().path) / "machine.yaml"


def shipped_machines() -> dict[str, Path]:
    """The files of machines with published rates, by name."""
    return {path.stem: path for path in sorted(_SHIPPED.glob("*.yaml"))}


def find_machine(asked: str | None, cache: Path | None = None) -> Machine | None:
    """The machine of the file `asked`, or the shipped one with that name.

    Without `asked`, this computer as `penstock machine` measured it, or None if it
    never was measured. Raises PolicyError if there is no such machine or its file is
    wrong.
    """
    if asked is None:
        own = kept_file("machine.yaml") if cache is None else own_machine_path(cache)
        return Machine.from_yaml(own) if own.exists() else None
    shipped = shipped_machines()
    if asked in shipped:
        return Machine.from_yaml(shipped[asked])
    if Path(asked).exists():
        return Machine.from_yaml(Path(asked))
    raise PolicyError(
        f"no machine {asked!r}: give a file (penstock machine -o machine.yaml writes "
        f"one) or one of {', '.join(shipped)}"
    )


def _plain(value: Any) -> Any:
    """`value` for YAML: rates with three digits; unknown keys are left out."""
    if isinstance(value, Section):
        found = {key: _plain(getattr(value, key)) for key in type(value).model_fields}
        return {key: item for key, item in found.items() if item not in (None, {})}
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, float):
        return float(f"{value:.3g}")
    if isinstance(value, int) and value >= 10**6:
        return _human(value)
    return value


def _human(number: int) -> int | str:
    """1420000000 becomes 1.42GB, 25769803776 becomes 24GiB. The result is exact or has
    three or four digits."""
    for unit, size in (("TiB", 2**40), ("GiB", 2**30), ("MiB", 2**20)):
        if number % size == 0:
            return f"{number // size}{unit}"
    for unit, size in (("TB", 10**12), ("GB", 10**9)):
        if number >= size:
            return f"{number / size:.4g}{unit}"
    return f"{number / 10**6:.4g}MB"


def _explain(error: ValidationError) -> str:
    problems = []
    for item in error.errors():
        name = ".".join(str(part) for part in item["loc"])
        if item["type"] == "extra_forbidden":
            known = ", ".join(Machine.model_fields)
            problems.append(f"unknown key {name!r}; a machine has: {known}")
        elif item["type"] == "missing":
            problems.append(f"{name} is missing")
        else:
            message = item["msg"].removeprefix("Value error, ")
            problems.append(f"{name}: {message} (got {item['input']!r})")
    return "; ".join(problems)

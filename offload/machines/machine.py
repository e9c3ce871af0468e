"""What a computer can do: its measured or published rates, in a file that people read
and edit."""

from pathlib import Path
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import Field, PositiveFloat, PositiveInt, ValidationError

from ...io.errors import PolicyError
from ..settings.extends import read_text
from ..settings.marked_yaml import read_value
from ..settings.section import Section
from ..settings.user_cache import kept_file, user_cache
from ..settings.values import Bytes

Dtype = Literal["float32", "bfloat16", "float16"]
PerRows = dict[PositiveInt, PositiveFloat]

_SHIPPED = Path(__file__).parent


class Disk(Section):
    """The drive that checkpoints lie on."""

    bandwidth: dict[str, Bytes]
    """Bytes a second of long reads, by reader (libaio, threads, aiofiles, gds)."""
    cpu_seconds_per_gb: dict[str, float] = Field(default_factory=dict)
    """CPU seconds that reading 10**9 bytes costs, by reader."""
    row_read_seconds: float = 0.0
    """Seconds for each of many short reads, such as rows of an embedding."""

    @property
    def best_reader(self) -> str:
        return max(self.bandwidth, key=lambda reader: self.bandwidth[reader])


class Copies(Section):
    """Bytes a second between host memory and one GPU."""

    pinned_to_device: Bytes
    pinned_to_host: Bytes
    both_ways: Bytes | None = None
    """Bytes a second of each direction, from pinned memory, while the other is busy."""
    pageable_to_device: Bytes | None = None
    pageable_to_host: Bytes | None = None
    peer: Bytes | None = None
    """From another GPU's memory."""


class Calls(Section):
    """Seconds that calls take beside what they compute: Python, hooks, switches. 0
    where nobody has measured them, which makes predictions ceilings."""

    job: float = 0.0
    """Of a job, before its first pass."""
    first_touch_per_gb: float = 0.0
    """Of 10**9 bytes of the working set that are filled for the first time."""
    cast_per_gb: float = 0.0
    """Of 10**9 stored bytes that the CPU casts beside its products: what these lose.
    Where it is 0, they are taken to lose a share of the cores."""
    product: float = 0.0
    """Of one product of matrices, whatever its size."""
    module: float = 0.0
    """Of one module with weights, for a micro-batch that is scored."""
    batch: float = 0.0
    """Of one micro-batch that is scored, outside of its modules."""
    joint_module: float = 0.0
    """Of one module for a micro-batch in decode, whose products are shared."""
    decode_module: float = 0.0
    """The same where they are not shared."""
    kv_layer: float = 0.0
    """Of one layer's keys and values of a micro-batch, where a tier (`kv.tier`) keeps
    them: putting them there and getting them."""
    step: float = 0.0
    """Of one micro-batch and one token of its rows, outside of its modules."""


class Machine(Section):
    """One computer. Rates are of one of its devices, in a second. Sizes and bytes a
    second are numbers or strings such as 24GiB and 1.4GB."""

    name: str
    source: str
    """Where the numbers come from."""
    is_estimate: bool = False
    """Whether they are quick estimates, made in a second or two."""
    device: Literal["cpu", "cuda", "tpu"] = "cpu"
    """What computes."""
    num_devices: PositiveInt = 1
    """Of them."""
    num_threads: Annotated[int, Field(ge=0)] = 0
    """That compute, on a CPU."""
    cores: PositiveInt = 1
    """Of the CPU, physical ones."""
    host_memory: Bytes
    """Bytes of the host's memory, all of it."""
    host_bandwidth: Bytes | None = None
    """Of the host's memory, bytes read and written counted."""
    device_memory: Bytes | None = None
    """Bytes of one device. None: it computes in the host's memory."""
    device_bandwidth: Bytes | None = None
    """Of the device's own memory."""
    matmul: dict[Dtype, PerRows]
    """FLOP/s of a product of a matrix of so many rows with a large one."""
    attention: dict[Dtype, PerRows] = Field(default_factory=dict)
    """FLOP/s of attention over sequences of so many tokens, masked products counted.
    Without it, that of products of as many rows."""
    pointwise_bandwidth: Bytes | None = None
    """Bytes a second that a block's operations between its products touch. Without it,
    the device's bandwidth."""
    decode_bandwidth: Bytes | None = None
    """The same for the few rows of a micro-batch in decode, whose products are
    shared."""
    cast_bandwidth: Bytes | None = None
    """Stored bytes a second that one thread casts to the dtype of the products."""
    disk: Disk | None = None
    """The drive that checkpoints lie on."""
    copies: Copies | None = None
    """To and from one GPU; None on a CPU."""
    network_bandwidth: Bytes | None = None
    """Of one device to its peers together."""
    calls: Calls = Calls()
    """What calls take beside what they compute."""

    def __init__(self, **values: Any) -> None:
        try:
            super().__init__(**values)
        except ValidationError as error:
            raise PolicyError(_explain(error)) from None

    @classmethod
    def from_yaml(cls, path: Path) -> Self:
        """Reads a machine file. Raises PolicyError naming the file and the key."""
        values = read_value(read_text(path), str(path))
        if not isinstance(values, dict):
            raise PolicyError(f"{path} must hold keys and values, not {values!r}")
        try:
            return cls(**{str(key): value for key, value in values.items()})
        except PolicyError as error:
            raise PolicyError(f"{path}: {error}") from None

    def to_yaml(self) -> str:
        """The file's text, each key with what it means."""
        parts = [f"# {(type(self).__doc__ or '').strip()}".replace("\n    ", "\n# ")]
        for key, field in type(self).model_fields.items():
            value = _plain(getattr(self, key))
            if value is None or value is False or value == {}:
                continue
            comment = " ".join((field.description or "").split())
            text = yaml.safe_dump({key: value}, sort_keys=False, allow_unicode=True)
            parts.append((f"# {comment}\n" if comment else "") + text.rstrip())
        return "\n".join(parts) + "\n"


def own_machine_path(cache: Path | None = None) -> Path:
    """Where `penstock machine` keeps what it measured, in `cache` or the user's."""
    return (cache or user_cache().path) / "machine.yaml"


def shipped_machines() -> dict[str, Path]:
    """The files of machines with published rates, by name."""
    return {path.stem: path for path in sorted(_SHIPPED.glob("*.yaml"))}


def find_machine(asked: str | None, cache: Path | None = None) -> Machine | None:
    """The machine in the file `asked`, or shipped by that name; without `asked` this
    computer as it was measured, None if it never was. Raises PolicyError."""
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
    """As YAML has it: rates with three digits, no key for what is not known."""
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
    """1420000000 -> 1.42GB, 25769803776 -> 24GiB; exactly, or to three digits."""
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

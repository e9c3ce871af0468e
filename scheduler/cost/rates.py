"""How fast a machine is: the rates that the cost model needs. Pure."""

import itertools
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from ...io.tier import Tier


@dataclass(frozen=True, slots=True)
class Curve:
    """A quantity measured at some points. Between them it is interpolated linearly in
    log-log scale; outside them it is constant."""

    points: tuple[tuple[float, float], ...]

    @classmethod
    def of(cls, measured: Mapping[int, float]) -> "Curve":
        """Makes a curve of {x: y}. Raises ValueError unless there are points and all
        numbers are positive."""
        points = tuple(sorted((float(x), float(y)) for x, y in measured.items()))
        if not points or any(x <= 0 or y <= 0 for x, y in points):
            raise ValueError(f"{dict(measured)} is not a curve: give positive numbers")
        return cls(points)

    def at(self, x: float) -> float:
        """The value at `x`."""
        points = self.points
        if x <= points[0][0]:
            return points[0][1]
        for (x0, y0), (x1, y1) in itertools.pairwise(points):
            if x <= x1:
                share = math.log(x / x0) / math.log(x1 / x0)
                return math.exp(math.log(y0) + share * math.log(y1 / y0))
        return points[-1][1]


@dataclass(frozen=True, slots=True)
class CallCosts:
    """Overheads in seconds: Python, hooks, switches. An unknown one is 0, so that the
    predicted speed is an upper bound."""

    job: float = 0.0
    """Overhead of a job, before its first pass."""
    first_touch: float = 0.0
    """Overhead of each byte of the working set that is written for the first time."""
    cast: float = 0.0
    """Delay of computing for each stored byte that is cast on the same cores at that
    time. 0: not measured."""
    module: float = 0.0
    """Scoring: overhead of one module with weights in one micro-batch."""
    batch: float = 0.0
    """Scoring: overhead of one micro-batch, outside all modules."""
    joint_module: float = 0.0
    """Decode: overhead of one module with weights in one micro-batch, if products are
    joined."""
    decode_module: float = 0.0
    """Decode: the same overhead if each micro-batch computes its own products."""
    kv_layer: float = 0.0
    """Overhead of one layer's keys and values of a micro-batch, if kept in a tier."""
    step: float = 0.0
    """Decode: overhead of one token of a micro-batch, outside all modules."""
    row_read: float = 0.0
    """Overhead of one embedding row that is read from its file."""


@dataclass(frozen=True, slots=True)
class Rates:
    """The rates of one machine, for weights of one dtype: FLOPs or bytes per second,
    unless a field says otherwise."""

    matmul_flops: Curve
    """Matrix products on one device, by the number of rows."""
    attention_flops: Curve
    """Attention, by the length of the sequences; masked products are counted."""
    device_bytes: float
    """Reads or writes of the device's memory."""
    pointwise_bytes: float
    """Bytes touched by the operations between products."""
    decode_bytes: float
    """The same in decode."""
    links: Mapping[str, float]
    """The link from each tier (`disk`, `host`, `peer`) to the device. Weights of a tier
    without a link are used in place."""
    cast_bytes: float = math.inf
    """Casting of stored bytes, in one thread."""
    decoding: Mapping[str, float] = field(default_factory=dict)
    """Decoding of stored bytes by other codecs, in one thread; those that are missing
    are as fast as casts."""
    num_cast_threads: int = 2
    num_cores: int = 1
    """CPU cores that casting and reading share with computing; 0: they share none."""
    read_cpu_seconds_per_byte: float = 0.0
    out_bytes: float = math.inf
    """Copies from the device to host memory."""
    product_seconds: float = 0.0
    """Seconds of overhead of each matrix product."""
    latency_seconds: Mapping[str, float] = field(default_factory=dict)
    """Seconds before the first byte of a load, by tier."""
    calls: CallCosts = CallCosts()
    crosses_host: bool = False
    """Whether bytes from disk also use the link of host memory, as on a GPU."""

    def cast_like(self, decoded: Iterable[tuple[str, int]]) -> float:
        """How many bytes could be cast in the time that `decoded` takes: codecs with
        their stored bytes."""
        return sum(
            nbytes * self.cast_bytes / self.decoding.get(codec, self.cast_bytes)
            if codec in self.decoding
            else nbytes
            for codec, nbytes in decoded
        )

    def crossing_seconds(self, tier: str, seconds: float) -> float:
        """Seconds on the link of host memory for bytes that take `seconds` on the link
        of `tier`."""
        if not self.crosses_host or tier != Tier.DISK or Tier.HOST not in self.links:
            return 0.0
        return seconds * self.links[Tier.DISK] / self.links[Tier.HOST]

    def matmul_seconds(self, flops: float, rows: float, weight_bytes: float) -> float:
        """Seconds of products of `rows` rows with `weight_bytes` of weights."""
        if not flops or not rows:
            return 0.0
        by_memory = weight_bytes / self.device_bytes
        return max(flops / self.matmul_flops.at(rows), by_memory)

"""How fast a machine is, as the cost model sees it. Pure."""

import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class Curve:
    """A measured quantity at some points, straight lines in logarithms between them;
    before the first and behind the last point it is what it is there."""

    points: tuple[tuple[float, float], ...]

    @classmethod
    def of(cls, measured: Mapping[int, float]) -> "Curve":
        """Raises ValueError for what has no points, or some that are not positive."""
        points = tuple(sorted((float(x), float(y)) for x, y in measured.items()))
        if not points or any(x <= 0 or y <= 0 for x, y in points):
            raise ValueError(f"{dict(measured)} is no curve: give positive numbers")
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
    """Seconds that calls take beside what they compute: Python, hooks, switches. What
    is not known is taken to cost nothing, which makes a prediction a ceiling."""

    job: float = 0.0
    """Of a job, before its first pass."""
    first_touch: float = 0.0
    """Of a byte of the working set that is filled for the first time."""
    cast: float = 0.0
    """Of a stored byte that is cast beside computing, on the same cores: what computing
    loses. 0: not measured."""
    module: float = 0.0
    """Of one module with weights, in a micro-batch that is scored."""
    batch: float = 0.0
    """Of one micro-batch that is scored, outside of all modules."""
    joint_module: float = 0.0
    """Of one module with weights and one micro-batch, in decode, when products are
    made once for all micro-batches."""
    decode_module: float = 0.0
    """The same when each micro-batch makes its own."""
    kv_layer: float = 0.0
    """Of one layer's keys and values of a micro-batch, where a tier keeps them."""
    step: float = 0.0
    """Of one micro-batch and one token of its rows, outside of all modules."""
    row_read: float = 0.0
    """Of one row of an embedding that is read from its file."""


@dataclass(frozen=True, slots=True)
class Rates:
    """What one machine does in a second, for weights of one dtype."""

    matmul_flops: Curve
    """Of one device, by the rows of the product."""
    attention_flops: Curve
    """By the length of the sequences; all products counted, masked ones too."""
    device_bytes: float
    """Read from or written to the computing device's memory."""
    pointwise_bytes: float
    """Touched by operations between products."""
    decode_bytes: float
    """The same, in decode."""
    links: Mapping[str, float]
    """Bytes over the link from a tier (`disk`, `host`, `peer`) to the device; a tier
    that is not named is used where it lies."""
    cast_bytes: float = math.inf
    """Stored bytes that one thread casts."""
    num_cast_threads: int = 2
    num_cores: int = 1
    """That casting and reading share with computing; 0: they share nothing."""
    read_cpu_seconds_per_byte: float = 0.0
    out_bytes: float = math.inf
    """From the device to host memory."""
    product_seconds: float = 0.0
    """What each product takes beside its FLOPs."""
    latency_seconds: Mapping[str, float] = field(default_factory=dict)
    """That a load from a tier takes before its first byte comes."""
    calls: CallCosts = CallCosts()
    crosses_host: bool = False
    """Whether what comes from disk crosses the link of host memory, too: a GPU has one
    way in."""

    def crossing_seconds(self, tier: str, seconds: float) -> float:
        """That bytes which keep the link of `tier` busy for `seconds` need on the link
        of host memory beside that."""
        if not self.crosses_host or tier != "disk" or "host" not in self.links:
            return 0.0
        return seconds * self.links["disk"] / self.links["host"]

    def matmul_seconds(self, flops: float, rows: float, weight_bytes: float) -> float:
        """Of products of `rows` rows with weights of `weight_bytes`."""
        if not flops or not rows:
            return 0.0
        by_memory = weight_bytes / self.device_bytes
        return max(flops / self.matmul_flops.at(rows), by_memory)

"""The input of a simulation: devices, links between memories, and work. Pure.

Times are in seconds, sizes in bytes, speeds in bytes per second.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ...io.tier import Tier

Floats = NDArray[np.float64]
STAYS = Tier.DEVICE
"""The tier of units that have a slot of their own in the working set."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SimulatedLink:
    """A link between two memories. Transfers run one after the other, as requested.

    Devices that share a link share its speed."""

    bytes_per_second: float
    latency_seconds: float = 0.0
    """Delay of each transfer's arrival, during which the link is not busy."""

    def __post_init__(self) -> None:
        if not self.bytes_per_second > 0 or not self.latency_seconds >= 0:
            raise ValueError(f"{self} moves nothing, or arrives before it began")


@dataclass(frozen=True, kw_only=True, slots=True)
class Traffic:
    """Keys and values: what is loaded for each micro-batch before it runs a unit, while
    the one before it computes, and what it writes back afterwards.

    They go before weights that wait for the same link. What was written must have
    arrived before the next pass reads it.
    """

    link_in: str
    link_out: str
    bytes_in: ArrayLike
    bytes_out: ArrayLike
    """Both are broadcast to (passes, units, micro-batches), since caches grow."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Rank:
    """One device, its working set, and where its weights are."""

    sizes: Sequence[int]
    """Bytes of each unit in its slot, in the order in which units run."""
    tiers: Sequence[str]
    """The tier of each unit: "device", or a tier that has a route."""
    capacity: int
    """Bytes of the working set: units that stay, and slots for the others."""
    compute_seconds: ArrayLike
    """Time of a micro-batch in a unit; broadcast to (passes, units, micro-batches)."""
    routes: Mapping[str, Sequence[str]] = field(default_factory=dict)
    """For each tier, the links that a unit passes one after the other, as a whole.
    Without a route for "device", units that stay are loaded from the start."""
    lookahead: int = 2
    kv: Traffic | None = None
    runs_ahead: bool = False
    """Whether a load only waits for its slot (a GPU: the host queued it long before).
    Otherwise it also waits until the visit that requests it begins (a CPU)."""

    def __post_init__(self) -> None:
        if len(self.sizes) != len(self.tiers):
            raise ValueError(f"{len(self.sizes)} units have {len(self.tiers)} tiers")
        missing = set(self.tiers) - set(self.routes) - {STAYS}
        if missing:
            raise ValueError(f"there is no route from {', '.join(sorted(missing))}")

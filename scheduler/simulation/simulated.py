"""What a simulation is given: devices, the links between memories, and what runs. Pure.

A time is in seconds, a size in bytes, a speed in bytes per second.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float64]
STAYS = "device"
"""The tier of units that have a place of their own in the working set."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SimulatedLink:
    """A way between two memories: one transfer after the other, in the order asked for.

    Of several devices that share it each has a part of its speed."""

    bytes_per_second: float
    latency_seconds: float = 0.0
    """That each transfer arrives later, without keeping the link busy."""

    def __post_init__(self) -> None:
        if not self.bytes_per_second > 0 or not self.latency_seconds >= 0:
            raise ValueError(f"{self} moves nothing, or arrives before it began")


@dataclass(frozen=True, kw_only=True, slots=True)
class Traffic:
    """Keys and values: what each micro-batch has brought in before it runs through a
    unit, one micro-batch ahead, and what it writes back after.

    They go before weights that wait for the same link. What was written must have
    arrived before the same unit's are read in the next pass.
    """

    link_in: str
    link_out: str
    bytes_in: ArrayLike
    bytes_out: ArrayLike
    """Both as broadcast to (passes, units, micro-batches): caches grow."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Rank:
    """One device, its working set, and where its weights are."""

    sizes: Sequence[int]
    """Bytes of each unit in its slot, in the order in which units run."""
    tiers: Sequence[str]
    """Where each of them stays: "device", or a tier that has a route."""
    capacity: int
    """Bytes of the working set: what stays on the device, and slots for the rest."""
    compute_seconds: ArrayLike
    """Of one micro-batch in one unit, as broadcast to (passes, units, micro-batches).
    """
    routes: Mapping[str, Sequence[str]] = field(default_factory=dict)
    """The links that a unit of each tier comes over, one after the other, as a whole
    each. Without a route for "device" what stays is there from the start."""
    lookahead: int = 2
    kv: Traffic | None = None
    runs_ahead: bool = False
    """Whether loads wait for the slot alone (a GPU, whose host has given them long
    ago), or for the turn of the unit that they are fetched beside, too (a CPU)."""

    def __post_init__(self) -> None:
        if len(self.sizes) != len(self.tiers):
            raise ValueError(f"{len(self.sizes)} units have {len(self.tiers)} tiers")
        missing = set(self.tiers) - set(self.routes) - {STAYS}
        if missing:
            raise ValueError(f"there is no route from {', '.join(sorted(missing))}")

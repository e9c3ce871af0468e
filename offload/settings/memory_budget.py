"""Divides the host memory of one process among its uses. Pure."""

from dataclasses import dataclass, field
from typing import Literal

from ...io.errors import DoesNotFitError
from ..monitoring.show import human_bytes

RESERVE_PART, MOST_RESERVE = 16, 1 << 30
"""Of the memory that is free, the last sixteenth is not used, up to 1 GiB. The kernel
and other processes need some."""
LEAST_HEAP, MOST_HEAP = 24 << 20, 176 << 20
"""Bytes of freed activations that the C library keeps for the next block (see
monitoring/heap.py)."""

Use = Literal["any", "rows", "completions"]
"""What a model is loaded for: "rows" that run through it once, "completions", which
keep keys and values, or "any" if it is not known."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryRoom:
    """The host memory that one process may take, in bytes."""

    total: int
    """All of it: the policy's `memory`. If that is `auto`: what is free when the model
    is loaded, plus what the process has already, minus the reserve."""
    runtime: int
    """What the process has when the model is put together (Python, torch, transformers,
    the model's modules), plus what libraries allocate once they compute."""
    is_asked: bool = False
    """Whether `total` is the policy's `memory`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryWish:
    """The host memory that a model can use, in bytes.

    Each part grows from its least size to the largest useful one, in the order in which
    that pays.
    """

    fixed: int = 0
    """Parts of fixed size: the host tier, staging and bounce buffers, and keys and
    values whose size the policy limits."""
    least_weights: int = 0
    """The working set in which the largest site just fits. With less, nothing can
    run."""
    paired_weights: int = 0
    """The working set in which each site and its successor fit: one is loaded while the
    other computes."""
    ahead_weights: int = 0
    """The working set with room for the sites that `lookahead` loads in advance."""
    whole_weights: int = 0
    """The working set in which the whole model fits, so that nothing is streamed."""
    least_activations: int = 0
    """Activations of one micro-batch that computes."""
    activations: int = 0
    """Activations of all tokens that the policy has in flight."""
    keeps_kv: bool = False
    """Whether keys and values are kept in tiers (`kv.tier`), apart from the
    activations."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryBudget:
    """The host memory of one process, divided; in bytes. The parts may be less than
    `total`; the rest stays free."""

    total: int
    runtime: int
    fixed: int
    weights: int
    """The working set, if the CPU computes (`device_memory`); 0 if a GPU does."""
    activations: int
    """Activations of all micro-batches in flight, with the keys and values that
    transformers' own caches keep."""
    computing: int = 0
    """The part of `activations` that the micro-batch that computes needs
    temporarily."""
    kv: int = 0
    """Keys and values in tiers that the policy does not limit."""
    heap: int = MOST_HEAP
    """Freed memory that is kept for the next block."""
    is_asked: bool = False
    is_tight: bool = field(default=False, compare=False)
    """Whether there is too little room for all that the policy would have in flight."""

    @property
    def waiting(self) -> int:
        """Bytes that suspended micro-batches may hold together."""
        return max(self.activations - self.computing, 0)

    def limit(self, *, has_width: bool) -> int | None:
        """The limit for the suspended micro-batches of a sweep, in bytes.

        None if the width of the sweep is bounded (`has_width`) and has enough room as
        far as it is known.
        """
        is_roomy = not (self.is_tight or self.is_asked)
        return None if has_width and is_roomy else self.waiting

    def __str__(self) -> str:
        """The budget in one line, for people."""
        what = "memory" if self.is_asked else "memory that is free"
        kv = f", keys and values {human_bytes(self.kv)}" if self.kv else ""
        weights = f"weights {human_bytes(self.weights)}, " if self.weights else ""
        buffers = self.fixed + self.heap
        return (
            f"{human_bytes(self.total)} of {what}: {weights}"
            f"activations {human_bytes(self.activations)}{kv}, "
            f"buffers {human_bytes(buffers)}, "
            f"Python and its libraries {human_bytes(self.runtime)}"
        )


def reserve_of(nbytes: int) -> int:
    """The part of `nbytes` free bytes that is not used."""
    return min(nbytes // RESERVE_PART, MOST_RESERVE)


def divide_memory(room: MemoryRoom, wish: MemoryWish, use: Use) -> MemoryBudget:
    """Divides `room` among the parts of `wish`.

    First, each part gets the least that works. Then they grow, as far as there is room,
    in this order: weights, until two neighbouring sites fit; activations, for all that
    is to be in flight; freed memory for the next block; weights that are loaded in
    advance. The rest goes to weights that stay; half of it to keys and values if there
    may be some. What is left goes to activations.

    Raises DoesNotFitError, which names the least that works.
    """
    taken = room.runtime + wish.fixed
    least = taken + wish.least_weights + wish.least_activations + LEAST_HEAP
    if least > room.total:
        raise DoesNotFitError(too_small(room, wish, least))
    left = room.total - least
    parts = {
        "weights": wish.least_weights,
        "activations": wish.least_activations,
        "heap": LEAST_HEAP,
        "kv": 0,
    }

    def grow(name: str, wanted: int, most: int | None = None) -> None:
        nonlocal left
        more = max(0, min(wanted - parts[name], left if most is None else most))
        parts[name] += more
        left -= more

    grow("weights", wish.paired_weights)
    grow("activations", wish.activations)
    grow("heap", MOST_HEAP, left // 2)
    grow("weights", wish.ahead_weights, left if use == "rows" else left // 2)
    if use != "rows":
        name = "kv" if wish.keeps_kv else "activations"
        grow(name, room.total, left // 2)
    grow("weights", wish.whole_weights)
    grow("activations", room.total)
    return MemoryBudget(
        total=room.total,
        runtime=room.runtime,
        fixed=wish.fixed,
        **parts,
        computing=wish.least_activations,
        is_asked=room.is_asked,
        is_tight=parts["activations"] < wish.activations,
    )


def too_small(room: MemoryRoom, wish: MemoryWish, least: int) -> str:
    """The message that `room` is too small, with the least that works (`least`
    bytes)."""
    needs = {
        "Python and its libraries": room.runtime,
        "the largest part of the model": wish.least_weights,
        "one micro-batch that computes": wish.least_activations + LEAST_HEAP,
        "buffers and what stays in host memory": wish.fixed,
    }
    parts = " + ".join(f"{human_bytes(n)} for {what}" for what, n in needs.items() if n)
    least_mib = -(-least // (1 << 20))
    if room.is_asked:
        return (
            f"memory of {human_bytes(room.total)} is too small: {parts} make "
            f"{least_mib} MiB; set memory to at least {least_mib}MiB"
        )
    free = room.total + reserve_of(room.total)
    enough = least * RESERVE_PART // (RESERVE_PART - 1)
    return (
        f"{human_bytes(free)} of memory is too small: {parts} make {least_mib} MiB; "
        f"give this process at least {-(-enough // (1 << 20))} MiB (memory={least_mib}"
        "MiB works with nothing to spare)"
    )

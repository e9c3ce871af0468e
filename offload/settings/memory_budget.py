"""How the memory of one process is divided among what needs it. Pure."""

from dataclasses import dataclass, field
from typing import Literal

from ...io.errors import DoesNotFitError
from ..monitoring.show import human_bytes

RESERVE_PART, MOST_RESERVE = 16, 1 << 30
"""Of what is free nobody asks for the last sixteenth, up to 1 GiB: the kernel has pages
of its own, and others come and go."""
LEAST_HEAP, MOST_HEAP = 24 << 20, 176 << 20
"""Freed activations that the C library keeps for the next block (`monitoring.heap`)."""

Use = Literal["any", "rows", "completions"]
"""What a model is loaded for: rows that run through it once, completions, which keep
their keys and values, or nobody knows."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryRoom:
    """What one process may take of the host's memory, in bytes."""

    total: int
    """All of it: the policy's `memory` or, left open, what is free when the model is
    loaded, what the process has already, less the reserve."""
    runtime: int
    """What it has when the model is put together (Python, torch, transformers, the
    model's modules), and what libraries allocate once they compute."""
    is_asked: bool = False
    """Whether the policy says the total."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryWish:
    """What a model would do with memory, in bytes. Each part grows from its least to
    what it makes use of, in the order in which that pays."""

    fixed: int = 0
    """Of exact size: the host tier, staging and bounce buffers, keys and values that
    the policy gives a limit."""
    least_weights: int = 0
    """Without them the largest part cannot be computed."""
    paired_weights: int = 0
    """Two neighbours fit: one is read while the other computes."""
    ahead_weights: int = 0
    """As many are read ahead as `lookahead` says."""
    whole_weights: int = 0
    """The model fits, and nothing is streamed."""
    least_activations: int = 0
    """Of one micro-batch that computes."""
    activations: int = 0
    """Of all tokens that the policy has in flight."""
    keeps_kv: bool = False
    """Whether keys and values have a store of their own (`kv.tier`), beside the
    activations."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryBudget:
    """The memory of one process, divided; in bytes. What is not said to be anybody's is
    left free."""

    total: int
    runtime: int
    fixed: int
    weights: int
    """The working set on a CPU (`device_memory`); 0 where a GPU has it."""
    activations: int
    """Of the micro-batches that wait and of the one that computes, with the keys and
    values that transformers' own caches keep."""
    computing: int = 0
    """Of those: what the one that computes takes for a while."""
    kv: int = 0
    """Of a store of keys and values that the policy gives no limits."""
    heap: int = MOST_HEAP
    """Freed memory that is kept for the next block."""
    is_asked: bool = False
    is_tight: bool = field(default=False, compare=False)
    """Whether not all that the policy would have in flight has room."""

    @property
    def waiting(self) -> int:
        """Bytes that suspended micro-batches may hold together."""
        return max(self.activations - self.computing, 0)

    def limit(self, *, has_width: bool) -> int | None:
        """Bytes that the suspended micro-batches of a sweep are held to. None for one
        whose width is bounded and has room, as far as anybody knows."""
        is_roomy = not (self.is_tight or self.is_asked)
        return None if has_width and is_roomy else self.waiting

    def __str__(self) -> str:
        """In one line, for people."""
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
    """What is left alone of `nbytes` that are free."""
    return min(nbytes // RESERVE_PART, MOST_RESERVE)


def divide_memory(room: MemoryRoom, wish: MemoryWish, use: Use) -> MemoryBudget:
    """Divides `room`. First everyone has the least that works. Then, as far as it
    goes: two parts of the weights at a time, all that is to be in flight, freed memory
    for the next block, parts that are read ahead; the rest is for weights that stay,
    half of it for keys and values where there may be some. What nobody has a use for
    is there for activations. Raises DoesNotFitError with the least that works."""
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
    """Why `room` does not do, and the least that would."""
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

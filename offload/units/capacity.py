"""Says how many bytes a working set has, and the least with which a model works."""

from collections.abc import Callable, Mapping

from ...io.errors import DoesNotFitError
from ...io.extent import align_down, align_up
from ..monitoring.show import human_bytes
from ..policy import Policy
from ..settings.memory_budget import MemoryBudget
from .division import Division


def capacity_of(
    policy: Policy,
    nbytes: Mapping[str, int],
    *,
    alignment: int,
    free_bytes: int,
    beside: int = 0,
) -> int:
    """Bytes of the working set: as the policy says; else as much of `free_bytes` as the
    model can use. Without those `beside` it in which weights are decoded."""
    if policy.device_memory != "auto":
        # Slots at the end of the arena must be aligned, too.
        return align_down(max(0, policy.device_memory - beside), alignment)
    free_bytes -= beside
    # A tensor that is read in place takes up to two pages more than it has bytes.
    whole = sum(nbytes.values()) + 8192 * (len(nbytes) + 1)
    return align_down(max(min(free_bytes, whole), 1 << 20), alignment)


def least_capacity(
    divide: Callable[[int], Division], capacity: int, alignment: int
) -> int:
    """The least multiple of `alignment` bytes, not less than `capacity`, that works.

    A larger budget keeps more units resident and so may need more; so may a smaller
    one, in which a model is divided into parts smaller than its largest one has to be.
    So the first budget is taken that has as much as it needs itself, and from there one
    that has less, as long as it works, too.
    """
    too_few = capacity
    while (needed := _needed(divide(capacity))) > capacity:
        capacity = align_up(needed, alignment)
    while capacity > too_few:
        needed = align_up(_needed(divide(capacity)), alignment)
        fewer = sorted({needed, capacity - alignment} - {capacity})
        works = (c for c in fewer if c > too_few and _needed(divide(c)) <= c)
        if (less := next(works, None)) is None:
            break
        capacity = less
    return capacity


def check_least(
    divide: Callable[[int], Division],
    capacity: int,
    *,
    alignment: int,
    beside: int = 0,
) -> None:
    """Raises DoesNotFitError if `capacity` bytes are too few; it names the least that
    works, with those `beside` it in which weights are decoded."""
    least = least_capacity(divide, capacity, alignment)
    if least > capacity:
        resident, by_site = divide(least).needs()
        decoding = f", and {beside} to decode weights in," if beside else ""
        needed = max(by_site, default=0) + resident + beside
        raise DoesNotFitError(
            f"device_memory of {capacity + beside} bytes is too small: "
            f"{max(by_site, default=0)} bytes of the largest part and {resident} that "
            f"are always needed{decoding} make at least {needed}; set device_memory to "
            f"at least {least + beside}"
        )


def _needed(division: Division) -> int:
    resident, by_site = division.needs()
    return resident + max(by_site, default=0)


def missing_overlap(
    division: Division, capacity: int, budget: MemoryBudget | None, beside: int = 0
) -> str | None:
    """What to announce if some site has no room beside its successor, which is loaded
    while it computes. None if each has.

    `capacity`, and what is `beside` it, are the policy's own, or a part of `budget`.
    """
    missing = division.paired_bytes() - capacity
    if missing > 0 and len(division.found.sites) > 1:
        asked = f"device_memory of {capacity + beside + missing} bytes"
        given = f"{capacity + beside}"
        if budget is not None:
            asked = f"memory of {human_bytes(budget.total + missing)}"
            given = human_bytes(budget.total)
        return (
            f"no room to fetch each part beside the one before it: {asked} would "
            f"overlap reading and computing everywhere (it is {given})"
        )
    return None

"""Which units stay in which tier. Pure."""

from collections.abc import Sequence


def spread(sizes: Sequence[int], budget: int) -> tuple[int, ...]:
    """As many of the units of `sizes` as fit into `budget`, spread evenly: between two
    that stay there are always about as many that are streamed, so that the link is
    busy all the time instead of waiting for the second half of a pass."""
    total = sum(sizes)
    if total <= budget:
        return tuple(range(len(sizes)))
    chosen: list[int] = []
    taken = passed = 0
    for unit, size in enumerate(sizes):
        passed += size
        # Never ahead of the even share, which is never more than the budget.
        if (taken + size) * total <= budget * passed:
            chosen.append(unit)
            taken += size
    for unit, size in enumerate(sizes):
        if unit not in chosen and taken + size <= budget:
            chosen.append(unit)
            taken += size
    return tuple(sorted(chosen))

"""Chooses the tier (memory or disk) in which each unit of weights stays. Pure."""

from collections.abc import Mapping, Sequence

import regex

from ..io.errors import PolicyError
from ..io.tier import Tier


def place(
    sizes: Sequence[int],
    names: Sequence[str],
    *,
    budgets: Mapping[str, int],
    rules: Mapping[str, str],
    kept: Sequence[int] | None = None,
) -> tuple[str, ...]:
    """Returns the tier of each unit of `sizes` bytes. The first of `rules` (regular
    expression -> tier) that matches its name decides. Without one, it is the first tier
    of `budgets` (bytes, in order of preference) that has room, else "disk". Units have
    as many bytes as `kept` says in all tiers but the device, if it is given.

    Raises PolicyError when rules put more into a tier than its budget holds.
    """
    ruled: list[str | None] = [None] * len(sizes)
    if rules:
        ruled = [
            next((tier for rule, tier in rules.items() if matches(rule, name)), None)
            for name in names
        ]
    left = dict(budgets)
    for tier in dict.fromkeys(tier for tier in ruled if tier not in (None, Tier.DISK)):
        assert tier is not None, "None was left out"
        there = sizes if kept is None or tier == Tier.DEVICE else kept
        need = sum(n for n, where in zip(there, ruled, strict=True) if where == tier)
        if need > left.get(tier, 0):
            raise PolicyError(
                f"placement puts {need} bytes into {tier!r}, which has room for "
                f"{left.get(tier, 0)}: raise {_setting(tier)}, or let "
                "fewer units match"
            )
        left[tier] = left.get(tier, 0) - need
    tiers = list(ruled)
    for tier, budget in left.items():
        free = [unit for unit, where in enumerate(tiers) if where is None]
        there = sizes if kept is None or tier == Tier.DEVICE else kept
        for index in spread([there[unit] for unit in free], budget):
            tiers[free[index]] = tier
    return tuple(tier or Tier.DISK for tier in tiers)


def _setting(place: str) -> str | None:
    """The policy's key for the budget of a tier, or of a peer device."""
    return Tier(place).setting if place in set(Tier) else f"peer.{place}"


def matches(rule: str, name: str) -> bool:
    """Whether `rule` matches `name`. Raises PolicyError if that takes too long: some
    expressions need exponential time."""
    try:
        return regex.search(rule, name, timeout=_MATCH_SECONDS) is not None
    except TimeoutError:
        raise PolicyError(
            f"placement: matching {rule!r} with {name!r} takes more than "
            f"{_MATCH_SECONDS} s: write it without repetitions inside of repetitions"
        ) from None


def spread(sizes: Sequence[int], budget: int) -> tuple[int, ...]:
    """Chooses units of `sizes` bytes that fit into `budget`, spread evenly over the
    model. The number of streamed units between two that stay is then about constant, so
    that the link is busy during the whole pass."""
    total = sum(sizes)
    if total <= budget:
        return tuple(range(len(sizes)))
    chosen: dict[int, None] = {}
    taken = passed = 0
    for unit, size in enumerate(sizes):
        passed += size
        # Never ahead of the even share, which is never more than the budget.
        if (taken + size) * total <= budget * passed:
            chosen[unit] = None
            taken += size
    for unit, size in enumerate(sizes):
        if unit not in chosen and taken + size <= budget:
            chosen[unit] = None
            taken += size
    return tuple(sorted(chosen))


_MATCH_SECONDS = 1.0

"""Chooses the tier of each unit."""

from collections.abc import Sequence

from ...io.tier import Tier
from ...io.weights.stored_image import StoredImage
from ...scheduler.placement import matches, place
from ..policy import Policy
from .division import Division
from .sites import ModelDivision


def placement_of(
    division: Division,
    capacity: int,
    policy: Policy,
    images: Sequence[StoredImage] | None,
    *,
    is_host: bool,
) -> tuple[str, ...]:
    """The tier of each unit. Resident units are loaded once, from disk."""
    found, transfers = division.found, division.transfers
    streamed = [
        index
        for index, unit in enumerate(found.units)
        if unit.sites and not unit.is_resident
    ]
    first_peer = next(iter(policy.peer), Tier.PEER)
    tiers = place(
        [transfers[unit].nbytes for unit in streamed],
        [found.units[unit].name for unit in streamed],
        budgets=_budgets(
            division,
            capacity,
            policy,
            is_in_place=_is_in_place(policy, images, is_host=is_host),
        ),
        kept=None if images is None else [images[u].layout.nbytes for u in streamed],
        rules={
            rule: first_peer if tier == Tier.PEER else tier
            for rule, tier in policy.placement.items()
        },
    )
    where = dict(zip(streamed, tiers, strict=True))
    return tuple(where.get(unit, Tier.DISK) for unit in range(len(found.units)))


def loaded_from(
    division: Division,
    placement: Sequence[str],
    policy: Policy,
    images: Sequence[StoredImage] | None,
    *,
    is_host: bool,
) -> tuple[str, ...]:
    """The tier that each unit is loaded from.

    It is that of its `placement`, but for experts that are on the device by no rule of
    the policy, and for which host memory has room, too. They come from there, and need
    not stay: so those stay on the device that are used most, whichever these are.
    """
    if _is_in_place(policy, images, is_host=is_host):
        return tuple(placement)
    layouts = division.layouts if images is None else [i.layout for i in images]
    left = policy.host_memory or 0
    left -= sum(
        plan.nbytes
        for plan, tier in zip(layouts, placement, strict=True)
        if tier == Tier.HOST
    )
    found = list(placement)
    for index, unit in enumerate(division.found.units):
        if placement[index] != Tier.DEVICE or unit.experts is None:
            continue
        is_ruled = any(matches(rule, unit.name) for rule in policy.placement)
        if not is_ruled and layouts[index].nbytes <= left:
            found[index] = Tier.HOST
            left -= layouts[index].nbytes
    return tuple(found)


def _is_in_place(
    policy: Policy, images: Sequence[StoredImage] | None, *, is_host: bool
) -> bool:
    """Whether units in host memory are computed with where they lie."""
    return is_host and Tier.HOST not in policy.links and images is None


def _budgets(
    division: Division, capacity: int, policy: Policy, *, is_in_place: bool
) -> dict[str, int]:
    """The bytes of each tier, the fastest first."""
    host: dict[str, int] = {Tier.HOST: policy.host_memory or 0}
    room = _room_to_stay(division, capacity, policy.lookahead)
    rest: dict[str, int] = {Tier.DEVICE: room, **policy.peer}
    return {**host, **rest} if is_in_place else {**rest, **host}


def _room_to_stay(division: Division, capacity: int, lookahead: int) -> int:
    """Bytes of the working set for units that stay.

    If the model fits, that is all streamed units; otherwise what is left beside the
    largest site and those that are prefetched meanwhile.
    """
    resident, by_site = division.needs()
    streamed = sum(
        plan.nbytes
        for unit, plan in zip(division.found.units, division.transfers, strict=True)
        if unit.sites and not unit.is_resident
    )
    if resident + streamed <= capacity:
        return streamed
    return max(0, capacity - resident - (1 + lookahead) * max(by_site, default=0))


def staying(model_division: ModelDivision, placement: Sequence[str]) -> list[int]:
    """The units that stay on the device for good. Where all weights come from disk, no
    experts do: those that are used most stay, as long as they are."""
    only_disk = {*placement} <= {Tier.DEVICE, Tier.DISK}
    return [
        index
        for index, unit in enumerate(model_division.units)
        if placement[index] == Tier.DEVICE and not (only_disk and unit.experts)
    ]

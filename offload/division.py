"""Divides a model into units that fit a budget, or says the least that would do."""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from torch import nn

from ..io.errors import DoesNotFitError
from ..io.extent import align_down
from ..io.layout import Layout, layout
from ..io.recipe import Recipe
from ..io.transfer import Transfer
from .memory import available_bytes
from .policy import Policy
from .sites import Found, Place, find

_log = logging.getLogger("penstock")


def capacity_of(
    policy: Policy,
    nbytes: Mapping[str, int],
    *,
    alignment: int,
    free_bytes: int | None,
) -> int:
    """Bytes of the working set: as asked, or half of the device's `free_bytes` (None:
    of the host's)."""
    if policy.device_memory != "auto":
        # Slots at the end of the arena must start aligned, too.
        return align_down(policy.device_memory, alignment)
    # What is read in place takes up to two pages more than it has bytes.
    whole = sum(nbytes.values()) + 8192 * (len(nbytes) + 1)
    free = available_bytes() if free_bytes is None else free_bytes
    wanted = max(min(free // 2, whole), 1 << 20)
    return align_down(wanted, alignment)


@dataclass(frozen=True)
class Division:
    """The units of a model: how each lies in its files, and how in a slot."""

    found: Found
    layouts: list[Layout]
    transfers: list[Transfer]

    def needs(self) -> tuple[int, list[int]]:
        """Bytes of slots of the resident units, and those that each site needs at
        once."""
        return needs(self.found, [plan.nbytes for plan in self.transfers])


def divide(
    model: nn.Module,
    places: Mapping[str, list[Place]],
    recipes: Mapping[str, Recipe],
    nbytes: Mapping[str, int],
    gathered: frozenset[str],
    policy: Policy,
    transfer_of: Callable[[Layout], Transfer],
    alignment: int,
    capacity: int,
) -> Division:
    """Blocks as they are, where two fit beside what is resident; finer where not. What
    cannot be divided (a head) may be larger."""
    limit = capacity
    while True:
        found = find(
            model,
            places,
            nbytes,
            gathered,
            max_site_bytes=limit,
            resident_below=min(policy.resident_below, capacity // 64),
        )
        layouts = [
            layout(
                unit.name,
                [recipes[name] for name in unit.tensors],
                alignment=alignment,
                # What is read once may take more reads; what stays, no gaps.
                max_gap_bytes=0 if unit.is_resident else policy.io.max_gap,
            )
            for unit in found.units
        ]
        division = Division(found, layouts, [transfer_of(plan) for plan in layouts])
        resident, by_site = division.needs()
        room = (capacity - resident) // 2
        is_coarse = any(
            nbytes > room and any(True for _ in site.module.children())
            for site, nbytes in zip(found.sites, by_site, strict=True)
        )
        if not is_coarse or limit <= 1:
            return division
        limit = max(1, min(room, limit * 3 // 4))


def needs(found: Found, sizes: Sequence[int]) -> tuple[int, list[int]]:
    """Bytes of the resident units, and those that each site needs at once, where units
    have `sizes`."""
    resident = 0
    by_site = [0] * len(found.sites)
    for unit, size in zip(found.units, sizes, strict=True):
        resident += size if unit.is_resident else 0
        for site in unit.sites:
            by_site[site] += size
    return resident, by_site


def check_least(divide: Callable[[int], Division], capacity: int) -> None:
    """A larger budget keeps more resident and so needs more: the least that works is
    the first that does with what it asks for itself."""
    least = capacity
    while True:
        resident, by_site = divide(least).needs()
        largest = max(by_site, default=0)
        if resident + largest <= least:
            break
        least = resident + largest
    if least > capacity:
        raise DoesNotFitError(
            f"device_memory of {capacity} bytes is too small: {largest} bytes of the "
            f"largest part and {resident} that are always needed make at least "
            f"{least}; set device_memory to at least {least}"
        )


def check_overlap(division: Division, capacity: int) -> tuple[str, ...]:
    """What is to be announced where two of the largest parts do not fit together."""
    resident, by_site = division.needs()
    largest = max(by_site, default=0)
    if resident + 2 * largest > capacity and len(by_site) > 1:
        message = (
            f"no room to fetch beside the largest part: device_memory of "
            f"{resident + 2 * largest} bytes would overlap reading and computing "
            f"everywhere (it is {capacity})"
        )
        _log.warning(message)
        return (message,)
    return ()

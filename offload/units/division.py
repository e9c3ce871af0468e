"""Divides a model into units that fit a budget, or says the least that would do."""

import logging
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

from torch import nn

from ...io.errors import DoesNotFitError
from ...io.extent import align_down
from ...io.layout import Layout, layout
from ...io.recipe import Recipe
from ...io.transfer import Transfer
from ..monitoring.memory import available_bytes
from ..policy import Policy
from .sites import Found, Place, find, module_sizes

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


@dataclass(frozen=True, eq=False)
class Division:
    """The units of a model: how each lies in its files, and how in a slot. One is equal
    to itself alone."""

    found: Found
    layouts: list[Layout]
    transfers: list[Transfer]

    def needs(self) -> tuple[int, list[int]]:
        """Bytes of slots of the resident units, and those that each site needs at
        once."""
        return needs(self.found, [plan.nbytes for plan in self.transfers])


@dataclass(frozen=True)
class Divider:
    """Divides one model for any budget. What it has worked out it keeps: few budgets
    ask for another division, and each is looked at module by module."""

    model: nn.Module
    places: Mapping[str, list[Place]]
    recipes: Mapping[str, Recipe]
    gathered: frozenset[str]
    transfer_of: Callable[[Layout], Transfer]
    resident_below: int
    """Bytes; as the policy says."""
    max_gap: int
    alignment: int
    """Of offsets and sizes of reads, and of slots."""
    memory_alignment: int
    """Of addresses that are read to."""
    tensor_alignment: int
    """Of assembled tensors in memory that units are read to."""
    _known: dict[tuple[int, int], Division] = field(default_factory=dict)
    """By how many modules are at most as large as a site may be, and below the size
    from which they are streamed: no more of the two limits is asked."""

    @cached_property
    def nbytes(self) -> dict[str, int]:
        """Of each tensor."""
        return {name: recipe.nbytes for name, recipe in self.recipes.items()}

    def divide(self, capacity: int) -> Division:
        """Blocks as they are, where two fit beside what is resident; finer where not.
        What cannot be divided (a head) may be larger."""
        limit = capacity
        while True:
            division = self._divided(limit, min(self.resident_below, capacity // 64))
            resident, by_site = division.needs()
            room = (capacity - resident) // 2
            is_coarse = any(
                nbytes > room and any(True for _ in site.module.children())
                for site, nbytes in zip(division.found.sites, by_site, strict=True)
            )
            if not is_coarse or limit <= 1:
                return division
            limit = max(1, min(room, limit * 3 // 4))

    def _divided(self, max_site_bytes: int, resident_below: int) -> Division:
        sizes = self._module_sizes
        key = bisect_right(sizes, max_site_bytes), bisect_left(sizes, resident_below)
        if key not in self._known:
            found = find(
                self.model,
                self.places,
                self.nbytes,
                self.gathered,
                max_site_bytes=max_site_bytes,
                resident_below=resident_below,
            )
            self._known[key] = self._laid_out(found)
        return self._known[key]

    def _laid_out(self, found: Found) -> Division:
        layouts = [
            layout(
                unit.name,
                [self.recipes[name] for name in unit.tensors],
                alignment=self.alignment,
                memory_alignment=self.memory_alignment,
                tensor_alignment=self.tensor_alignment,
                # What is read once may take more reads; what stays, no gaps.
                max_gap_bytes=0 if unit.is_resident else self.max_gap,
            )
            for unit in found.units
        ]
        return Division(found, layouts, [self.transfer_of(plan) for plan in layouts])

    @cached_property
    def _module_sizes(self) -> list[int]:
        return sorted(module_sizes(self.model, self.places, self.nbytes))


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

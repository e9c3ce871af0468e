"""Divides a model into units that fit a budget, or says the least that would do."""

import logging
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise

from torch import nn

from ...io.errors import DoesNotFitError
from ...io.extent import align_down
from ...io.weights.layout import Layout, layout
from ...io.weights.recipe import Recipe
from ...io.weights.transfer import Transfer
from ..monitoring.show import human_bytes
from ..policy import Policy
from ..settings.memory_budget import MemoryBudget
from .sites import ModelDivision, ParameterRef, find, module_sizes

_log = logging.getLogger("penstock")


def capacity_of(
    policy: Policy,
    nbytes: Mapping[str, int],
    *,
    alignment: int,
    free_bytes: int,
) -> int:
    """Bytes of the working set: as asked, or as many of the `free_bytes` of its device
    as the model has."""
    if policy.device_memory != "auto":
        # Slots at the end of the arena must start aligned, too.
        return align_down(policy.device_memory, alignment)
    # What is read in place takes up to two pages more than it has bytes.
    whole = sum(nbytes.values()) + 8192 * (len(nbytes) + 1)
    return align_down(max(min(free_bytes, whole), 1 << 20), alignment)


@dataclass(frozen=True, eq=False)
class Division:
    """The units of a model: how each lies in its files, and how in a slot. One is equal
    to itself alone."""

    found: ModelDivision
    layouts: list[Layout]
    transfers: list[Transfer]

    def needs(self) -> tuple[int, list[int]]:
        """Bytes of slots of the resident units, and those that each site needs at
        once."""
        return needs(self.found, [plan.nbytes for plan in self.transfers])

    def paired_bytes(self) -> int:
        """Bytes in which each part fits beside the one after it, which is read while
        it computes; after the last comes the first. All that is always needed is in
        them."""
        resident, by_site = self.needs()
        pairs = pairwise([*by_site, *by_site[:1]])
        return resident + max((one + other for one, other in pairs), default=0)


@dataclass(frozen=True)
class Divider:
    """Divides one model for any budget. What it has worked out it keeps: few budgets
    ask for another division, and each is looked at module by module."""

    model: nn.Module
    places: Mapping[str, list[ParameterRef]]
    recipes: Mapping[str, Recipe]
    gathered: frozenset[str]
    transfer_of: Callable[[Layout], Transfer]
    resident_below: int
    """Bytes; as the policy says."""
    max_gap: int
    alignment: int
    """Alignment of the offsets and sizes of reads, and of slots."""
    memory_alignment: int
    """Alignment of the addresses that are read to."""
    tensor_alignment: int
    """Alignment of assembled tensors in memory that units are read to."""
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

    def _laid_out(self, found: ModelDivision) -> Division:
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


def needs(found: ModelDivision, sizes: Sequence[int]) -> tuple[int, list[int]]:
    """Bytes of the resident units, and those that each site needs at once, where units
    have `sizes`."""
    resident = 0
    by_site = [0] * len(found.sites)
    for unit, size in zip(found.units, sizes, strict=True):
        resident += size if unit.is_resident else 0
        for site in unit.sites:
            by_site[site] += size
    return resident, by_site


def least_capacity(divide: Callable[[int], Division], capacity: int) -> int:
    """The least that works, of `capacity` and more: a larger budget keeps more resident
    and so needs more; the first counts that does with what it asks for itself."""
    while (needed := _needed(divide(capacity))) > capacity:
        capacity = needed
    return capacity


def check_least(divide: Callable[[int], Division], capacity: int) -> None:
    """Raises DoesNotFitError, naming the least that works."""
    least = least_capacity(divide, capacity)
    if least > capacity:
        resident, by_site = divide(least).needs()
        raise DoesNotFitError(
            f"device_memory of {capacity} bytes is too small: {max(by_site, default=0)}"
            f" bytes of the largest part and {resident} that are always needed make at "
            f"least {least}; set device_memory to at least {least}"
        )


def _needed(division: Division) -> int:
    resident, by_site = division.needs()
    return resident + max(by_site, default=0)


def check_overlap(
    division: Division, capacity: int, budget: MemoryBudget | None
) -> tuple[str, ...]:
    """What is to be announced where some part has no room beside its neighbour, which
    is fetched while it computes. `capacity` is the policy's own, or a part of
    `budget`."""
    missing = division.paired_bytes() - capacity
    if missing > 0 and len(division.found.sites) > 1:
        asked = f"device_memory of {capacity + missing} bytes"
        given = f"{capacity}"
        if budget is not None:
            asked = f"memory of {human_bytes(budget.total + missing)}"
            given = human_bytes(budget.total)
        message = (
            f"no room to fetch each part beside the one before it: {asked} would "
            f"overlap reading and computing everywhere (it is {given})"
        )
        _log.warning(message)
        return (message,)
    return ()

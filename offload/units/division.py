"""Divides a model into units that fit a budget, or names the least that works."""

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
from ...io.weights.stored_image import StoredImage, stored_image
from ...io.weights.transfer import Transfer
from ..monitoring.show import human_bytes
from ..policy import Policy
from ..settings.memory_budget import MemoryBudget
from .sites import ModelDivision, ParameterRef, find, module_sizes


def capacity_of(
    policy: Policy,
    nbytes: Mapping[str, int],
    *,
    alignment: int,
    free_bytes: int,
) -> int:
    """Bytes of the working set: as the policy says; else as much of `free_bytes` as the
    model can use."""
    if policy.device_memory != "auto":
        # Slots at the end of the arena must be aligned, too.
        return align_down(policy.device_memory, alignment)
    # A tensor that is read in place takes up to two pages more than it has bytes.
    whole = sum(nbytes.values()) + 8192 * (len(nbytes) + 1)
    return align_down(max(min(free_bytes, whole), 1 << 20), alignment)


@dataclass(frozen=True, eq=False)
class Division:
    """The units of a model, and how each is laid out in its files and in its slot.

    A division is equal only to itself.
    """

    found: ModelDivision
    layouts: list[Layout]
    transfers: list[Transfer]

    def needs(self) -> tuple[int, list[int]]:
        """Bytes of the resident units, and the bytes that each site needs at once."""
        return needs(self.found, [plan.nbytes for plan in self.transfers])

    def whole_bytes(self) -> int:
        """Bytes in which all units fit at the same time."""
        return sum(plan.nbytes for plan in self.transfers)

    def paired_bytes(self) -> int:
        """Bytes in which each site fits beside its successor, resident units included.

        The successor is loaded while the site computes; the first site follows the last
        one.
        """
        resident, by_site = self.needs()
        pairs = pairwise([*by_site, *by_site[:1]])
        return resident + max((one + other for one, other in pairs), default=0)


@dataclass(frozen=True)
class Divider:
    """Divides one model for any budget.

    Divisions are kept: few budgets lead to another one, and each takes a look at every
    module.
    """

    model: nn.Module
    places: Mapping[str, list[ParameterRef]]
    recipes: Mapping[str, Recipe]
    gathered: frozenset[str]
    transfer_of: Callable[[Layout], Transfer]
    resident_below: int
    """Modules outside of blocks that have fewer bytes stay; from the policy."""
    max_gap: int
    alignment: int
    """The alignment of offsets and sizes of reads, and of slots, in bytes."""
    memory_alignment: int
    """The alignment of the addresses that are read to, in bytes."""
    tensor_alignment: int
    """The alignment of assembled tensors in memory that units are read to, in bytes."""
    _known: dict[tuple[int, int], Division] = field(default_factory=dict)
    """The divisions made so far.

    The keys are how many modules are no larger than the largest site, and how many are
    too small to be streamed. Nothing else of the two limits matters.
    """

    _images: dict[Division, tuple[StoredImage, ...]] = field(default_factory=dict)

    @cached_property
    def nbytes(self) -> dict[str, int]:
        """The bytes of each tensor."""
        return {name: recipe.nbytes for name, recipe in self.recipes.items()}

    def divide(self, capacity: int) -> Division:
        """Divides the model for a working set of `capacity` bytes.

        Blocks are units if two of them fit beside the resident units; otherwise they
        are divided further. Modules that cannot be divided (a head) may be larger.
        """
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
                # A unit that is read once may take more reads, but should have no gaps.
                max_gap_bytes=0 if unit.is_resident else self.max_gap,
            )
            for unit in found.units
        ]
        return Division(found, layouts, [self.transfer_of(plan) for plan in layouts])

    def images(self, division: Division) -> tuple[StoredImage, ...]:
        """How memory can keep each unit of `division` as its files have it."""
        if division not in self._images:
            units = zip(division.found.units, division.transfers, strict=True)
            self._images[division] = tuple(
                stored_image(
                    unit.name,
                    [self.recipes[name] for name in unit.tensors],
                    slot,
                    alignment=self.alignment,
                    max_gap_bytes=0,
                )
                for unit, slot in units
            )
        return self._images[division]

    @cached_property
    def _module_sizes(self) -> list[int]:
        return sorted(module_sizes(self.model, self.places, self.nbytes))


def needs(found: ModelDivision, sizes: Sequence[int]) -> tuple[int, list[int]]:
    """Bytes of the resident units, and the bytes that each site needs at once. Units
    have `sizes`."""
    resident = 0
    by_site = [0] * len(found.sites)
    for unit, size in zip(found.units, sizes, strict=True):
        resident += size if unit.is_resident else 0
        for site in unit.sites:
            by_site[site] += size
    return resident, by_site


def least_capacity(divide: Callable[[int], Division], capacity: int) -> int:
    """The least number of bytes, not less than `capacity`, that works.

    A larger budget keeps more units resident and so needs more. The first budget counts
    that has as much as it needs itself.
    """
    while (needed := _needed(divide(capacity))) > capacity:
        capacity = needed
    return capacity


def check_least(divide: Callable[[int], Division], capacity: int) -> None:
    """Raises DoesNotFitError if `capacity` bytes are too few; it names the least that
    works."""
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


def missing_overlap(
    division: Division, capacity: int, budget: MemoryBudget | None
) -> str | None:
    """What to announce if some site has no room beside its successor, which is loaded
    while it computes. None if each has.

    `capacity` is the policy's own, or a part of `budget`.
    """
    missing = division.paired_bytes() - capacity
    if missing > 0 and len(division.found.sites) > 1:
        asked = f"device_memory of {capacity + missing} bytes"
        given = f"{capacity}"
        if budget is not None:
            asked = f"memory of {human_bytes(budget.total + missing)}"
            given = human_bytes(budget.total)
        return (
            f"no room to fetch each part beside the one before it: {asked} would "
            f"overlap reading and computing everywhere (it is {given})"
        )
    return None

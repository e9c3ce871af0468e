"""Divides a model into units that fit a budget."""

from bisect import bisect_left, bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise

from torch import nn

from ...io.readers.files import ALIGNMENT
from ...io.weights.layout import Layout
from ...io.weights.recipe import Recipe
from ...io.weights.stored_image import StoredImage
from ...io.weights.transfer import Transfer
from .expert_stack import ExpertStack
from .experts import find_stacks
from .sites import FoundSites, ModelDivision, find
from .subtrees import ParameterRef, Subtrees
from .unit_plans import UnitPlans


@dataclass(frozen=True, eq=False)
class Division:
    """The units of a model, and how each is laid out in its files and in its slot.

    A division is equal only to itself.
    """

    coarse: FoundSites
    plans: UnitPlans

    @cached_property
    def found(self) -> ModelDivision:
        """Its sites and units."""
        return self.coarse.divided()

    @cached_property
    def layouts(self) -> list[Layout]:
        """How each unit is laid out as it is read."""
        return self._planned[0]

    @cached_property
    def transfers(self) -> list[Transfer]:
        """How each unit is laid out in its slot."""
        return self._planned[1]

    @cached_property
    def _planned(self) -> tuple[list[Layout], list[Transfer]]:
        return self.plans.plans(self.found)

    def needs(self) -> tuple[int, list[int]]:
        """Bytes of the resident units, and the bytes that each site needs at once,
        those of the site around it included."""
        return self._needs

    def whole_bytes(self) -> int:
        """Bytes in which all units fit at the same time."""
        pieces = (sum(sizes) for _, sizes in self._windows)
        return sum(self._whole_sizes) + sum(pieces)

    def paired_bytes(self) -> int:
        """Bytes in which each site fits beside its successor, resident units included.

        The successor is loaded while the site computes; the first site follows the last
        one.
        """
        resident, _ = self.needs()
        own = self._own_bytes
        around = [_with_outer(self.coarse, site) for site in range(len(own))]
        pairs = pairwise([*around, *around[:1]])
        together = (sum(own[site] for site in one | other) for one, other in pairs)
        return resident + max(together, default=0)

    def is_coded(self, share: float) -> bool:
        """Whether the streamed units have at most `share` of their bytes as the files
        have them."""
        stored, decoded = self._streamed_bytes
        return stored <= share * decoded

    @cached_property
    def _streamed_bytes(self) -> tuple[int, int]:
        plans = [
            (plan.stored_bytes, plan.nbytes)
            for unit, plan in zip(self.found.units, self.transfers, strict=True)
            if unit.sites and not unit.is_resident
        ]
        return sum(stored for stored, _ in plans), sum(n for _, n in plans)

    @cached_property
    def _needs(self) -> tuple[int, list[int]]:
        units = zip(self.coarse.whole, self._whole_sizes, strict=True)
        resident = sum(size for unit, size in units if unit.is_resident)
        own = self._own_bytes
        around = (_with_outer(self.coarse, site) for site in range(len(own)))
        return resident, [sum(own[site] for site in sites) for sites in around]

    @cached_property
    def _own_bytes(self) -> list[int]:
        """The bytes of the units of each site."""
        own = [0] * len(self.coarse.sites)
        for unit, size in zip(self.coarse.whole, self._whole_sizes, strict=True):
            for site in unit.sites:
                own[site] += size
        for site, sizes in self._windows:
            own[site] += sum(sizes)
        return own

    @cached_property
    def _whole_sizes(self) -> list[int]:
        """The bytes of each unit of whole tensors in its slot."""
        return [self.plans.size(unit) for unit in self.coarse.whole]

    @cached_property
    def _windows(self) -> list[tuple[int, Sequence[int]]]:
        """The site of each window, and the bytes of its pieces in their slots."""
        found: list[tuple[int, Sequence[int]]] = []
        for windows in self.coarse.by_stack():
            pieces = tuple(piece for window in windows for piece in window.pieces)
            sizes, start = self.plans.piece_sizes(windows[0].stack, pieces), 0
            for window in windows:
                end = start + len(window.pieces)
                found.append((window.site, sizes[start:end]))
                start = end
        return found


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
    plans: UnitPlans
    resident_below: int
    """Modules outside of blocks that have fewer bytes stay; from the policy."""
    may_cut_experts: bool
    """Whether stacked experts may be divided: a compiler would trace what waits for
    them."""
    _known: dict[tuple[int, ...], Division] = field(default_factory=dict)
    """The divisions made so far.

    The keys are how many modules are no larger than the largest site, and how many are
    too small to be streamed. Nothing else of the two limits matters, unless experts are
    divided.
    """
    _images: dict[Division, tuple[StoredImage, ...]] = field(default_factory=dict)

    @cached_property
    def nbytes(self) -> dict[str, int]:
        """The bytes of each tensor."""
        return {name: recipe.nbytes for name, recipe in self.recipes.items()}

    @cached_property
    def _most_bytes(self) -> int:
        """Bytes in which all tensors fit, wherever they lie in files."""
        return sum(self.nbytes.values()) + 2 * ALIGNMENT * (len(self.nbytes) + 1)

    @cached_property
    def stacks(self) -> dict[int, ExpertStack]:
        """The stacked experts that may be divided, by the id of their module."""
        if not self.may_cut_experts:
            return {}
        return find_stacks(self.model, self.places, self.recipes)

    def divide(self, capacity: int, in_place_bytes: int = 0) -> Division:
        """Divides the model for a working set of `capacity` bytes.

        Blocks are units if two of them fit beside the resident units; otherwise they
        are divided further. Modules that cannot be divided (a head) may be larger.
        Experts are divided if the model does not fit, together with `in_place_bytes` of
        host memory in which units are used where they lie.
        """
        room = capacity + in_place_bytes
        if not self.stacks or self._most_bytes <= room:
            return self._divide(capacity, {})
        if sum(self.nbytes.values()) <= room:
            division = self._divide(capacity, {})
            if division.whole_bytes() <= room:
                return division
        return self._divide(capacity, self.stacks)

    def _divide(self, capacity: int, stacks: Mapping[int, ExpertStack]) -> Division:
        limit = capacity
        small = min(self.resident_below, capacity // 64)
        while True:
            division = self._divided(limit, small, stacks)
            if capacity >= 2 * self._most_bytes:
                return division
            resident, by_site = division.needs()
            room = (capacity - resident) // 2
            is_coarse = any(
                nbytes > room and _can_be_divided(division.coarse, site)
                for site, nbytes in enumerate(by_site)
            )
            if not is_coarse or limit <= 1:
                return division
            limit = max(1, min(room, limit * 3 // 4))

    def _divided(
        self,
        max_site_bytes: int,
        resident_below: int,
        stacks: Mapping[int, ExpertStack],
    ) -> Division:
        sizes = self._module_sizes
        key: tuple[int, ...] = (
            bisect_right(sizes, max_site_bytes),
            bisect_left(sizes, resident_below),
        )
        if stacks:
            key = (*key, max_site_bytes)
        if key not in self._known:
            found = find(
                self.model,
                self.places,
                self._subtrees,
                self.nbytes,
                self.gathered,
                max_site_bytes=max_site_bytes,
                resident_below=resident_below,
                stacks=stacks,
            )
            self._known[key] = Division(found, self.plans)
        return self._known[key]

    def images(self, division: Division) -> tuple[StoredImage, ...]:
        """How memory can keep each unit of `division` as its files have it."""
        if division not in self._images:
            self._images[division] = tuple(map(self.plans.image, division.found.units))
        return self._images[division]

    @cached_property
    def _module_sizes(self) -> list[int]:
        return sorted(self._subtrees.sizes(self.nbytes))

    @cached_property
    def _subtrees(self) -> Subtrees:
        return Subtrees(self.model, self.places)


def _with_outer(found: FoundSites, site: int) -> set[int]:
    outer = found.sites[site].outer
    return {site} if outer is None else {site, outer}


def _can_be_divided(found: FoundSites, index: int) -> bool:
    """Whether a smaller limit makes smaller sites of this one."""
    site = found.sites[index]
    if site.experts is None:
        return any(True for _ in site.module.children())
    low, high = site.experts
    assert site.outer is not None, "a window is inside of a site"
    return high - low > 1 or found.sites[site.outer].module is not site.module

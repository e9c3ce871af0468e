"""Decides how a model is divided into units and where each stays. Reads no weights."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property, partial

from torch import nn

from ...io.codecs.computed import Computed
from ...io.errors import DoesNotFitError
from ...io.extent import align_up
from ...io.readers.files import ALIGNMENT
from ...io.tier import Tier
from ...io.weights.layout import TENSOR_ALIGNMENT, Layout
from ...io.weights.recipe import Recipe
from ...io.weights.stored_image import StoredImage
from ...io.weights.transfer import SLOT_ALIGNMENT, Transfer, packed, same_layout
from ...io.weights.unpacking import scratch_bytes
from ..policy import Policy
from ..settings.memory_budget import MemoryBudget, MemoryRoom, Use, divide_memory
from .capacity import capacity_of, check_least, least_capacity
from .division import Divider, Division
from .placing import placement_of
from .subtrees import ParameterRef
from .unit_plans import UnitPlans
from .wish import Wishes

_WORTHWHILE = 0.9
"""Tiers keep weights as stored if these have fewer bytes than this share of others."""


@dataclass(frozen=True)
class Arrangement:
    """The units of a model, where their tensors are used, their tiers, and the working
    set."""

    places: Mapping[str, list[ParameterRef]]
    recipes: Mapping[str, Recipe]
    """The recipe of each distinct tensor, by its name; a tied tensor has one name."""
    gathered: frozenset[str]
    """Embedding tables that are never loaded: single rows are read from the file."""
    capacity: int
    """Bytes of the working set."""
    division: Division
    placement: tuple[str, ...]
    """The tier of each unit."""
    images: tuple[StoredImage, ...] | None = None
    """How tiers in memory keep each unit as its files have it; None if they keep what
    is computed with."""
    budget: MemoryBudget | None = None
    """How the process's memory is divided; None if the caller gave no memory."""
    scratch_bytes: int = 0
    """Bytes of the device, beside the working set, in which weights are decoded."""


class Arranger:
    """Arranges one model under policies that differ in their budgets."""

    def __init__(
        self,
        model: nn.Module,
        recipes: Mapping[str, Recipe],
        policy: Policy,
        *,
        is_host: bool,
        memory_alignment: int,
    ) -> None:
        self._places, self._recipes = _places(model, recipes)
        self._gathered = _gathered(
            model, self._places, self._recipes, policy.gather_rows, is_host
        )
        plans = UnitPlans(
            self._recipes,
            partial(_transfer, is_host, policy.io.max_gap),
            policy.io.max_gap,
            ALIGNMENT,
            memory_alignment,
            # A GPU's slots are filled anew, unless the CPU computes with some units.
            TENSOR_ALIGNMENT if is_host or policy.experts != "device" else 1,
        )
        self._divider = Divider(
            model,
            self._places,
            self._recipes,
            self._gathered,
            plans,
            policy.resident_below,
            not policy.compile,
        )
        self._is_host = is_host
        self._wishes = Wishes(model, self._recipes, self._divider.divide)

    def arrange(
        self,
        policy: Policy,
        *,
        room: MemoryRoom | None,
        device_bytes: int | None = None,
        use: Use = "any",
    ) -> Arrangement:
        """Arranges the model under `policy`.

        `room` is the host memory that the process may take; None if nobody asks.
        `device_bytes` are free on the device for the working set. Raises
        DoesNotFitError, which names the least that works.
        """
        budget = None
        if room is not None:
            wish = self._wishes.of(policy, use, is_host=self._is_host)
            budget = divide_memory(room, wish, use)
            if self._is_host:
                device_bytes = budget.weights
        scratch, images = self._scratch_bytes(policy), None
        if scratch:
            try:
                capacity, division = self._divided(policy, device_bytes or 0, scratch)
                images = self._images(division, policy)
            except DoesNotFitError:
                if policy.weights_kept == "stored":
                    raise
        if images is None:  # nothing is decoded on the device
            capacity, division = self._divided(policy, device_bytes or 0, 0)
            images = None if scratch else self._images(division, policy)
            scratch = 0
        placement = placement_of(
            division, capacity, policy, images, is_host=self._is_host
        )
        return Arrangement(
            self._places,
            self._recipes,
            self._gathered,
            capacity,
            division,
            placement,
            images,
            budget,
            scratch,
        )

    def _divided(
        self, policy: Policy, device_bytes: int, scratch: int
    ) -> tuple[int, Division]:
        """The bytes of the working set, and the model as it is divided for them."""
        divider = self._divider
        capacity = capacity_of(
            policy,
            divider.nbytes,
            alignment=ALIGNMENT,
            free_bytes=device_bytes,
            beside=scratch,
        )
        in_place = self._is_host and Tier.HOST not in policy.links
        used_there = (policy.host_memory or 0) * in_place
        divide = partial(divider.divide, in_place_bytes=used_there)
        division = divide(capacity)
        check_least(divide, capacity, alignment=ALIGNMENT, beside=scratch)
        if not self._is_host:  # whose memory is taken at once, used or not
            capacity = min(capacity, align_up(division.whole_bytes(), ALIGNMENT))
        return capacity, division

    def _scratch_bytes(self, policy: Policy) -> int:
        """Bytes of an accelerator in which its links decode weights: one from the drive
        and one from each other tier."""
        if self._is_host or policy.weights_kept == "decoded" or self._is_computed:
            return 0
        num_links = 1 + bool(policy.host_memory) + len(policy.peer)
        return num_links * self._scratch_of_a_link

    @cached_property
    def least_bytes(self) -> int:
        """The least bytes of a working set in which the model can be streamed."""
        return least_capacity(self._divider.divide, 1, ALIGNMENT)

    @cached_property
    def _scratch_of_a_link(self) -> int:
        return scratch_bytes(self._recipes.values())

    @cached_property
    def _is_computed(self) -> bool:
        """Whether a function computes some tensors."""
        parts = (p for recipe in self._recipes.values() for p in recipe.slices)
        return any(isinstance(part.codec, Computed) for part in parts)

    def _images(
        self, division: Division, policy: Policy
    ) -> tuple[StoredImage, ...] | None:
        """The units as tiers in memory keep them; None if they are as in slots."""
        is_in_memory = policy.host_memory or policy.peer
        if policy.weights_kept == "decoded" or (self._is_host and not is_in_memory):
            return None
        if not self._is_host and self._is_computed:
            return None  # the device could compute other bits than the host
        if policy.weights_kept == "auto" and not division.is_coded(_WORTHWHILE):
            return None
        found = self._divider.images(division)
        units = zip(division.found.units, division.transfers, found, strict=True)
        sizes = [
            (slot.nbytes, image.layout.nbytes)
            for unit, slot, image in units
            if unit.sites and not unit.is_resident
        ]
        decoded, stored = map(sum, zip(*sizes, strict=True)) if sizes else (0, 0)
        if policy.weights_kept == "auto":
            fits = self._is_host and decoded <= (policy.host_memory or 0)
            if fits or stored > _WORTHWHILE * decoded:
                return None
        return found


def arrange(
    model: nn.Module,
    recipes: Mapping[str, Recipe],
    policy: Policy,
    *,
    is_host: bool,
    memory_alignment: int,
    room: MemoryRoom | None,
    device_bytes: int | None,
    use: Use = "any",
) -> Arrangement:
    """Arranges `model` for a device that is the host (`is_host`), or has `device_bytes`
    for the working set.

    Weights are read to addresses that are multiples of `memory_alignment`. Raises
    DoesNotFitError, which names the least that works.
    """
    arranger = Arranger(
        model, recipes, policy, is_host=is_host, memory_alignment=memory_alignment
    )
    return arranger.arrange(policy, room=room, device_bytes=device_bytes, use=use)


def _transfer(is_host: bool, max_gap_bytes: int, plan: Layout) -> Transfer:
    """How the unit of `plan` lies in a slot: in host memory as it is read, on a GPU
    packed."""
    if is_host:
        return same_layout(plan)
    return packed(plan, alignment=SLOT_ALIGNMENT, max_gap_bytes=max_gap_bytes)


def _places(
    model: nn.Module, recipes: Mapping[str, Recipe]
) -> tuple[dict[str, list[ParameterRef]], dict[str, Recipe]]:
    """Where each distinct tensor is used, and its recipe, by the name that has a
    recipe."""
    by_tensor: dict[int, str] = {}
    places: dict[str, list[ParameterRef]] = {}
    for module_name, module in model.named_modules():
        for store, is_buffer in ((module._parameters, False), (module._buffers, True)):
            for key, tensor in store.items():
                if tensor is None:
                    continue
                name = f"{module_name}.{key}" if module_name else key
                if name in recipes:
                    by_tensor.setdefault(id(tensor), name)
                places.setdefault(str(id(tensor)), []).append(
                    ParameterRef(module, key, is_buffer)
                )
    named = {
        by_tensor[int(tensor)]: where
        for tensor, where in places.items()
        if int(tensor) in by_tensor
    }
    return named, {name: recipes[name] for name in named}


def _gathered(
    model: nn.Module,
    places: Mapping[str, list[ParameterRef]],
    recipes: Mapping[str, Recipe],
    min_bytes: int,
    is_host: bool,
) -> frozenset[str]:
    """The embedding tables whose rows are read one by one: those that are large enough
    and lie in one byte range.

    There are none on a GPU, since it would have to wait until the host has seen the
    ids.
    """
    return frozenset(
        name
        for name, recipe in recipes.items()
        if is_host
        and recipe.nbytes >= min_bytes
        and recipe.stored_rows is not None
        and len(recipe.shape) == 2
        and any(isinstance(place.module, nn.Embedding) for place in places[name])
    )

"""Puts a streamed model together."""

import logging
from collections.abc import Mapping
from contextlib import ExitStack
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import nn

from ..io.checkpoint import Checkpoint
from ..io.device import Device
from ..io.files import ALIGNMENT
from ..io.recipe import Recipe
from ..io.timeline import Record, Timeline
from ..io.transfer import Transfer
from ..scheduler.doors import Doors, Site
from ..scheduler.gate import Gate
from ..scheduler.order import Order
from ..scheduler.placement import place
from ..scheduler.working_set import WorkingSet
from .binding import Binding
from .buffers import MovedBuffers
from .contradictions import without_effect
from .division import Division, capacity_of, check_least, check_overlap, divide
from .engine import Engine
from .kv import open_kv
from .memory import HeapTrimmer
from .poison import StreamedParameter
from .policy import Policy
from .row_wise import find_row_wise
from .rows import RowGatherer
from .sites import Found, Place
from .tiers import Tiers, open_device, transfer_of

if TYPE_CHECKING:
    from .compilation import Compilation

_log = logging.getLogger("penstock")


def build(
    model: nn.Module,
    checkpoint: Checkpoint,
    recipes: Mapping[str, Recipe],
    policy: Policy,
) -> Engine:
    """Streams the tensors of `recipes` (by their names in `model`) from `checkpoint`.

    Raises DoesNotFitError, saying the least that works, when device_memory is too
    small. Nothing is left open when it raises.
    """
    places, recipes = _places(model, recipes)
    nbytes = {name: recipe.nbytes for name, recipe in recipes.items()}
    device = open_device(policy.device)
    gathered = _gathered(model, places, recipes, policy.gather_rows, device)
    alignment = ALIGNMENT
    capacity = capacity_of(
        policy, nbytes, alignment=alignment, free_bytes=device.free_bytes()
    )
    transfer = partial(transfer_of, device, policy)
    divided = partial(
        divide, model, places, recipes, nbytes, gathered, policy, transfer, alignment
    )
    division = divided(capacity)
    check_least(divided, capacity)
    fallbacks = (*check_overlap(division, capacity), *_announce(policy))
    found, layouts = division.found, division.layouts
    transfers = division.transfers
    placement = _placement(division, device, capacity, policy)
    timeline = Timeline()
    record = timeline.record
    tiers = Tiers(
        checkpoint, layouts, transfers, placement, device, capacity, policy, record
    )
    with ExitStack() as opened:  # what fails leaves nothing open
        opened.callback(tiers.close)
        gatherers = {
            name: RowGatherer(
                recipes[name],
                tiers.reader,
                buffer_bytes=policy.io.bounce,
                max_gap_bytes=tiers.reader.alignment,
            )
            for name in gathered
        }
        stand_ins: dict[str, torch.Tensor] = {}
        binding = Binding(
            found, transfers, places, stand_ins, tiers.memory, tiers.in_place
        )
        working_set = _working_set(found, transfers, capacity, tiers, record)
        doors = _doors(found, working_set, binding)
        kv = open_kv(model, device, policy, tiers.pin, record)
        if kv is not None:
            opened.callback(kv.close)
        engine = Engine(
            model,
            policy,
            found,
            recipes=recipes,
            tiers=tiers,
            buffers=_move_buffers(model, places, device),
            working_set=working_set,
            binding=binding,
            doors=doors,
            gate=Gate(
                doors,
                Order(len(found.sites)),
                lookahead=policy.lookahead,
                record=record,
            ),
            gatherers=tuple(gatherers.values()),
            fallbacks=fallbacks,
            compilation=_compilation(found, policy),
            row_order=Order(len(find_row_wise(found))),
            kv=kv,
            timeline=timeline,
        )
        opened.pop_all()
        opened.callback(engine.close)
        for name, recipe in recipes.items():
            gatherer = gatherers.get(name)
            stand_ins[name] = StreamedParameter(
                name,
                recipe.shape,
                recipe.dtype,
                torch.device(device.name),
                touch=partial(engine.touch, name),
                gather=gatherer.gather if gatherer is not None else None,
                requires_grad=_requires_grad(places[name][0]),
            )
        binding.poison_all()
        engine.start()
        opened.pop_all()
    return engine


def _announce(policy: Policy) -> list[str]:
    """What was asked for and has no effect."""
    found = without_effect(policy)
    for message in found:
        _log.warning(message)
    return found


def _move_buffers(
    model: nn.Module, places: Mapping[str, list[Place]], device: Device
) -> MovedBuffers:
    names = {id(module): name for name, module in model.named_modules()}
    streamed = frozenset(
        f"{names[id(place.module)]}.{place.key}".lstrip(".")
        for where in places.values()
        for place in where
        if place.is_buffer
    )
    return MovedBuffers(model, torch.device(device.name), streamed)


def _placement(
    division: Division, device: Device, capacity: int, policy: Policy
) -> tuple[str, ...]:
    """The tier of each unit. What is always needed is loaded from disk, once."""
    found, transfers = division.found, division.transfers
    streamed = [
        index
        for index, unit in enumerate(found.units)
        if unit.sites and not unit.is_resident
    ]
    first_peer = next(iter(policy.peer), "peer")
    tiers = place(
        [transfers[unit].nbytes for unit in streamed],
        [found.units[unit].name for unit in streamed],
        budgets=_budgets(division, device, capacity, policy),
        rules={
            rule: first_peer if tier == "peer" else tier
            for rule, tier in policy.placement.items()
        },
    )
    where = dict(zip(streamed, tiers, strict=True))
    return tuple(where.get(unit, "disk") for unit in range(len(found.units)))


def _budgets(
    division: Division, device: Device, capacity: int, policy: Policy
) -> dict[str, int]:
    """Bytes of each tier, the fastest first."""
    host = {"host": policy.host_memory or 0}
    room = _room_to_stay(division, capacity, policy.lookahead)
    rest = {"device": room, **policy.peer}
    is_in_place = device.is_host and "host" not in policy.links
    return {**host, **rest} if is_in_place else {**rest, **host}


def _room_to_stay(division: Division, capacity: int, lookahead: int) -> int:
    """Bytes of the working set that units may keep for good: all of them if the model
    fits; else beside the largest part, each part that is fetched meanwhile has room."""
    resident, by_site = division.needs()
    streamed = sum(
        plan.nbytes
        for unit, plan in zip(division.found.units, division.transfers, strict=True)
        if unit.sites and not unit.is_resident
    )
    if resident + streamed <= capacity:
        return streamed
    return max(0, capacity - resident - (1 + lookahead) * max(by_site, default=0))


def _working_set(
    found: Found,
    transfers: list[Transfer],
    capacity: int,
    tiers: Tiers,
    record: Record,
) -> WorkingSet:
    in_place = tiers.in_place.offsets if tiers.in_place is not None else {}
    return WorkingSet(
        [plan.nbytes for plan in transfers],
        names=[unit.name for unit in found.units],
        capacity=capacity,
        load=tiers.load,
        mark=tiers.mark,
        needed=frozenset(
            index
            for index, unit in enumerate(found.units)
            if (unit.sites or unit.is_resident) and index not in in_place
        ),
        staying=[u for u, tier in enumerate(tiers.placement) if tier == "device"],
        record=record,
    )


def _doors(found: Found, working_set: WorkingSet, binding: Binding) -> Doors:
    trim = HeapTrimmer()

    def bind(site: int, offsets: tuple[int, ...]) -> None:
        trim()  # the site before this one has freed its activations
        binding.bind(site, offsets)

    sites = [
        Site(site.name, binding.units_of_site(index))
        for index, site in enumerate(found.sites)
    ]
    return Doors(sites, working_set, bind=bind, unbind=binding.unbind)


def _compilation(found: Found, policy: Policy) -> "Compilation | None":
    if not policy.compile:
        return None
    from .compilation import Compilation  # torch's compiler takes long to import

    return Compilation(found)


def _places(
    model: nn.Module, recipes: Mapping[str, Recipe]
) -> tuple[dict[str, list[Place]], dict[str, Recipe]]:
    """Where each distinct tensor is used, under the one name that has a recipe."""
    by_tensor: dict[int, str] = {}
    places: dict[str, list[Place]] = {}
    for module_name, module in model.named_modules():
        for store, is_buffer in ((module._parameters, False), (module._buffers, True)):
            for key, tensor in store.items():
                if tensor is None:
                    continue
                name = f"{module_name}.{key}" if module_name else key
                if name in recipes:
                    by_tensor.setdefault(id(tensor), name)
                places.setdefault(str(id(tensor)), []).append(
                    Place(module, key, is_buffer)
                )
    named = {
        by_tensor[int(tensor)]: where
        for tensor, where in places.items()
        if int(tensor) in by_tensor
    }
    return named, {name: recipes[name] for name in named}


def _requires_grad(place: Place) -> bool:
    parameter = place.module._parameters.get(place.key)
    return parameter is not None and parameter.requires_grad


def _gathered(
    model: nn.Module,
    places: Mapping[str, list[Place]],
    recipes: Mapping[str, Recipe],
    min_bytes: int,
    device: Device,
) -> frozenset[str]:
    """Tables that are large enough, lie in one byte range, and are an embedding's. None
    on a GPU: that would have to wait until the host has seen the ids."""
    return frozenset(
        name
        for name, recipe in recipes.items()
        if device.is_host
        and recipe.nbytes >= min_bytes
        and recipe.stored_rows is not None
        and len(recipe.shape) == 2
        and any(isinstance(place.module, nn.Embedding) for place in places[name])
    )

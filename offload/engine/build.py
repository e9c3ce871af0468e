"""Makes the engine of a streamed model."""

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import nn

from ...io.checkpoint.index import Checkpoint
from ...io.devices.opening import open_device
from ...io.event import Event
from ...io.fallbacks import Fallbacks
from ...io.fork_guard import ForkGuard
from ...io.sharing.ring import Seat
from ...io.timeline import Record, Timeline
from ...io.weights.load import Load
from ...io.weights.recipe import Recipe
from ...io.weights.transfer import Transfer
from ...scheduler.order import Order
from ...scheduler.slots.open_sites import OpenSites, Site
from ...scheduler.slots.routing import Routing
from ...scheduler.slots.working_set import WorkingSet
from ...scheduler.sweep.entry import ForwardEntry
from ...scheduler.sweep.turn import Turn
from ..kv.tiers import open_kv
from ..monitoring.heap import Heap
from ..policy import Policy
from ..settings.contradictions import without_effect
from ..settings.memory_budget import MemoryRoom, Use
from ..units.arrangement import arrange
from ..units.capacity import missing_overlap
from ..units.division import Division
from ..units.expert_probe import experts_kept_whole
from ..units.placing import loaded_from, staying
from ..units.row_wise import find_row_wise
from ..units.sites import ModelDivision
from ..weights.binding import Binding
from ..weights.placeholder import StreamedParameter
from ..weights.row_gatherer import RowGatherer
from .engine import Engine
from .groups import Forwards, Ranked, Weights
from .host_cache import HostCache
from .host_experts import open_host_experts
from .moved_tensors import move_rest
from .readers import memory_alignment_for
from .tiers import Tiers

if TYPE_CHECKING:
    from .compilation import Compilation


def build(
    model: nn.Module,
    checkpoint: Checkpoint,
    recipes: Mapping[str, Recipe],
    policy: Policy,
    *,
    room: MemoryRoom,
    use: Use = "any",
    ranked: Ranked | None = None,
    seat: Seat | None = None,
    tiers_of: Callable[..., Tiers] | None = None,
) -> Engine:
    """Makes the engine that streams the tensors of `recipes` (by their names in
    `model`) from `checkpoint`. It uses the memory of `room`, and divides it as suits
    `use`. With `ranked`, `recipes` are those of this rank; with `seat`, what is read is
    shared with other workers. `tiers_of` opens the tiers.

    Raises DoesNotFitError, which says how much is enough, if `room` or device_memory is
    too small. Nothing is left open when it raises.
    """
    device = open_device(policy.device, ranked.num_on_device if ranked else 1)
    on_gpu = device.free_bytes()
    arranged = arrange(
        model,
        recipes,
        policy,
        is_host=device.is_host,
        memory_alignment=memory_alignment_for(checkpoint.stamps, policy),
        room=room,
        device_bytes=None if on_gpu is None else on_gpu // 2,
        use=use,
    )
    budget = arranged.budget
    assert budget is not None, "there is room to divide"
    places, recipes = arranged.places, arranged.recipes
    division, capacity = arranged.division, arranged.capacity
    model_division, transfers = division.found, division.transfers
    fallbacks = Fallbacks()
    is_part_of_budget = policy.device_memory == "auto" and device.is_host
    fallbacks.announce(
        missing_overlap(
            division,
            capacity,
            budget if is_part_of_budget else None,
            arranged.scratch_bytes,
        )
    )
    in_place = (policy.host_memory or 0) * device.is_host
    if division.whole_bytes() > capacity + in_place and not policy.compile:
        cut = [divided.stack.module for divided in model_division.stacks]
        fallbacks.announce(experts_kept_whole(model, cut))
    for message in without_effect(policy):
        fallbacks.announce(message)
    timeline = Timeline()
    record = timeline.record
    parts = (
        checkpoint,
        division.layouts,
        transfers,
        loaded_from(
            division,
            arranged.placement,
            policy,
            arranged.images,
            is_host=device.is_host,
        ),
        device,
        capacity,
        policy,
        record,
        fallbacks,
        arranged.images,
        seat,
    )
    tiers = Tiers(*parts) if tiers_of is None else tiers_of(*parts)
    with ExitStack() as opened:  # closes what was opened if a later step fails
        opened.callback(tiers.close)
        gatherers = {
            name: RowGatherer(
                recipes[name],
                tiers.layered,
                buffer_bytes=policy.io.bounce,
                max_gap_bytes=tiers.layered.alignment,
            )
            for name in arranged.gathered
        }
        placeholders: dict[str, torch.Tensor] = {}
        wants_grad = {name: places[name][0].requires_grad for name in recipes}
        binding = Binding(
            model_division,
            transfers,
            places,
            placeholders,
            tiers.memory,
            tiers.in_place,
        )
        host_experts = open_host_experts(division, tiers, wants_grad, policy, fallbacks)
        opened.callback(host_experts.close)
        routing = _routing(division, binding, host_experts.least_tokens)
        working_set = _working_set(
            model_division, transfers, capacity, tiers, record, routing
        )
        open_sites = _open_sites(
            model_division,
            transfers,
            working_set,
            binding,
            Heap(budget.heap),
            routing,
        )
        kv = open_kv(model, device, policy, tiers.pin, record, budget.kv, fallbacks)
        if kv is not None:
            opened.callback(kv.close)
        joins = policy.coalesce != "off" and not policy.compile
        row_wise = find_row_wise(model_division) if joins else ()
        weights = Weights(
            arranged,
            tiers,
            working_set,
            binding,
            gatherers,
            move_rest(model, places, device),
            HostCache(tiers, working_set, routing, host_experts, policy),
        )
        turn = Turn()
        entry = ForwardEntry(
            open_sites,
            Order(len(model_division.sites)),
            lookahead=policy.lookahead,
            record=record,
            fork_guard=ForkGuard(in_child=binding.unbind_in_child),
            turn=turn,
        )
        compilation = _compilation(model_division, policy)
        order, gathered = Order(len(row_wise)), tiers.gathered
        forwards = Forwards(
            entry, compilation, row_wise, order, kv, timeline, ranked, gathered
        )
        engine = Engine(
            model, policy, weights=weights, forwards=forwards, fallbacks=fallbacks
        )
        opened.pop_all()
        opened.callback(engine.close)
        for name, recipe in recipes.items():
            gatherer = gatherers.get(name)
            placeholders[name] = StreamedParameter(
                name,
                recipe.shape,
                recipe.dtype,
                torch.device(device.name),
                touch=partial(engine.touch, name),
                gather=gatherer.gather if gatherer is not None else None,
                requires_grad=wants_grad[name],
            )
        binding.put_placeholders()
        engine.start()
        if gathered is not None:
            gathered.ready(lambda: turn.owner is not None)
        opened.pop_all()
    return engine


def _working_set(
    model_division: ModelDivision,
    transfers: list[Transfer],
    capacity: int,
    tiers: Tiers,
    record: Record,
    routing: Routing,
) -> WorkingSet:
    def load(unit: int, offset: int, after: tuple[Event, ...]) -> Load:
        routing.load(unit)
        return tiers.load(unit, offset, after)

    in_place = tiers.in_place.offsets if tiers.in_place is not None else {}
    return WorkingSet(
        [plan.nbytes for plan in transfers],
        names=[unit.name for unit in model_division.units],
        capacity=capacity,
        load=load,
        mark=tiers.mark,
        needed=frozenset(
            index
            for index, unit in enumerate(model_division.units)
            if (unit.sites or unit.is_resident) and index not in in_place
        ),
        staying=staying(model_division, tiers.placement),
        record=record,
        worth=routing.worth,
    )


def _routing(
    division: Division, binding: Binding, least_tokens: Mapping[int, int]
) -> Routing:
    stacks = [
        {
            site: tuple(unit for unit in units if not binding.is_in_host(unit))
            for site, units in stack.windows
        }
        for stack in division.found.stacks
    ]
    stored = [plan.stored_bytes for plan in division.layouts]
    return Routing(stacks, stored, least_tokens)


def _open_sites(
    model_division: ModelDivision,
    transfers: list[Transfer],
    working_set: WorkingSet,
    binding: Binding,
    heap: Heap,
    routing: Routing,
) -> OpenSites:
    def bind(site: int, offsets: tuple[int, ...]) -> None:
        heap.trim()  # the previous site has just freed its activations
        binding.bind(site, offsets)

    sites = [
        Site(site.name, binding.units_of_site(index))
        for index, site in enumerate(model_division.sites)
    ]
    for stack in model_division.stacks:
        for site, pieces in stack.windows:
            outer = model_division.sites[site].outer
            assert outer is not None, "a window is inside of a site"
            around = binding.units_of_site(outer)
            loaded = (unit for unit in pieces if not binding.is_in_host(unit))
            each = {transfers[unit].nbytes: unit for unit in loaded}
            working_set.need_together((*around, piece) for piece in each.values())
    return OpenSites(
        sites, working_set, bind=bind, unbind=binding.unbind, routing=routing
    )


def _compilation(model_division: ModelDivision, policy: Policy) -> "Compilation | None":
    if not policy.compile:
        return None
    from .compilation import Compilation  # torch's compiler takes long to import

    return Compilation(model_division)

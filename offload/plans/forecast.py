"""The cost model of a model, a policy and a machine, and the work of tasks for it."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from torch import nn

from ...io.readers.files import ALIGNMENT
from ...io.tier import Tier, tier_of
from ...io.weights.recipe import Recipe
from ...scheduler.cost.memory_need import RUNTIME_BYTES
from ...scheduler.cost.model import CostModel
from ...scheduler.cost.shape import MicroBatchShape, ModelShape, Settings
from ...scheduler.cost.site_loads import site_loads
from ...scheduler.cost.workload import Generating, Scoring
from ...scheduler.packing import alike, pack
from ..generation.prompt_chunk import prompt_chunk
from ..machines.machine import Machine
from ..policy import Policy
from ..settings.memory_budget import MemoryRoom, reserve_of
from ..tasks.task import Task
from ..traces.model_cache import ModelCache, model_cache
from ..units.arrangement import Arrangement, Arranger
from ..units.describe import describe
from ..units.division import Division
from ..units.expert_cuts import bytes_of
from .rates import rates_of


@dataclass(frozen=True, slots=True)
class Forecast:
    """A model as a policy arranges it, and what its passes would cost."""

    arrangement: Arrangement
    shape: ModelShape
    model: CostModel
    policy: Policy

    @property
    def bytes_by_tier(self) -> dict[str, int]:
        """The bytes of the weights in each tier: in the dtype that is computed in,
        unless memory keeps them as they are stored."""
        found: dict[str, int] = dict.fromkeys(Tier, 0)
        units = self.arrangement.division.found.units
        recipes, images = self.arrangement.recipes, self.arrangement.images
        placed: set[str] = set()
        for index, unit in enumerate(units):
            tier = self.arrangement.placement[index]
            where = Tier.DEVICE if unit.is_resident else tier
            where = Tier.DISK if not (unit.sites or unit.is_resident) else where
            nbytes = bytes_of(unit, recipes)
            if images is not None and tier_of(where) in (Tier.HOST, Tier.PEER):
                nbytes = images[index].layout.nbytes
            found[tier_of(where)] += nbytes
            placed.update(unit.tensors)
        found[Tier.DISK] += sum(r.nbytes for n, r in recipes.items() if n not in placed)
        return found


class Forecaster:
    """Forecasts one model on one machine for one task, under many policies. What the
    policies have in common is computed once.

    `cache` says what the model keeps of each token, where `module` cannot run as it is;
    `adjusted` corrects the shape that is made of its modules.
    """

    def __init__(
        self,
        module: Any,
        recipes: Mapping[str, Recipe],
        machine: Machine,
        task: Task,
        *,
        cache: ModelCache | None = None,
        adjusted: Callable[[ModelShape], ModelShape] = lambda shape: shape,
    ) -> None:
        self._module = module
        self._recipes = recipes
        self._machine = machine
        self._task = task
        self._arrangers: dict[tuple[Any, ...], Arranger] = {}
        self._described: dict[Division, tuple[ModelShape, str]] = {}
        self._dense: dict[nn.Module, bool] = {}
        self._given_cache = cache
        self._adjusted = adjusted

    @cached_property
    def _cache(self) -> ModelCache:
        return self._given_cache or model_cache(self._module)

    def forecast(self, policy: Policy) -> Forecast:
        """The forecast under `policy`. Raises DoesNotFitError where its budgets are too
        small, and PolicyError."""
        is_host = policy.device == "cpu"
        machine = self._machine
        on_gpu = machine.device_memory
        arrangement = self._arranger(policy, is_host).arrange(
            policy,
            room=_room(machine, policy),
            device_bytes=None if on_gpu is None else on_gpu // 2,
            use=self._task.use,
        )
        division = arrangement.division
        if division not in self._described:
            shape, dtype = _described(
                self._module, arrangement, self._cache, self._dense
            )
            self._described[division] = self._adjusted(shape), dtype
        described = self._described[division]
        found = _forecast(arrangement, *described, policy, machine, self._task)
        stops = not self._task.runs_head
        settings = replace(found.model.settings, stops_at_hidden=stops)
        model = replace(found.model, settings=settings)
        loads = site_loads(model.shape, model.rates, settings)
        return replace(found, model=replace(model, loads=loads))

    def least_bytes(self, policy: Policy) -> int:
        """The least device_memory in bytes that does for the weights."""
        return self._arranger(policy, policy.device == "cpu").least_bytes

    def _arranger(self, policy: Policy, is_host: bool) -> Arranger:
        key = (is_host, policy.gather_rows, policy.resident_below, policy.io.max_gap)
        if key not in self._arrangers:
            self._arrangers[key] = Arranger(
                self._module,
                self._recipes,
                policy,
                is_host=is_host,
                memory_alignment=ALIGNMENT,  # enough for any drive
            )
        return self._arrangers[key]


def forecast(
    module: Any,
    recipes: Mapping[str, Recipe],
    policy: Policy,
    machine: Machine,
    task: Task,
) -> Forecast:
    """The forecast of `module`, which may be on meta, for `task`. Raises
    DoesNotFitError where the policy's budgets are too small, and PolicyError."""
    return Forecaster(module, recipes, machine, task).forecast(policy)


def of_arrangement(
    module: Any,
    arrangement: Arrangement,
    policy: Policy,
    machine: Machine,
    task: Task,
) -> Forecast:
    """The forecast of `module` with an arrangement that exists already."""
    described = _described(module, arrangement)
    return _forecast(arrangement, *described, policy, machine, task)


def _room(machine: Machine, policy: Policy) -> MemoryRoom | None:
    """The host memory for weights and what is in flight; None where the policy has its
    sizes, as a plan's policy has."""
    if policy.device != "cpu" or policy.device_memory != "auto":
        return None
    is_asked = policy.memory != "auto"
    free = machine.host_memory
    total = policy.memory if policy.memory != "auto" else free - reserve_of(free)
    return MemoryRoom(total=total, runtime=RUNTIME_BYTES, is_asked=is_asked)


def _described(
    module: Any,
    arrangement: Arrangement,
    cache: ModelCache | None = None,
    dense: dict[nn.Module, bool] | None = None,
) -> tuple[ModelShape, str]:
    """The shape of the model, and the dtype that it computes in."""
    recipes = arrangement.recipes
    is_gathered = bool(arrangement.gathered)
    shape = describe(
        module,
        arrangement.division,
        recipes,
        gathers_rows=is_gathered,
        cache=cache,
        dense=dense,
    )
    return shape, dtype_of(recipes)


def _forecast(
    arrangement: Arrangement,
    shape: ModelShape,
    dtype: str,
    policy: Policy,
    machine: Machine,
    task: Task,
) -> Forecast:
    images, kept = arrangement.images, None
    if images is not None:
        kept = tuple(image.layout.nbytes for image in images)
    settings = Settings(
        arrangement.placement,
        arrangement.capacity,
        kept_bytes=kept,
        lookahead=policy.lookahead,
        logits_bytes=policy.logits_memory,
        kv_tier=policy.kv.tier,
        kv_itemsize=kv_itemsize(policy),
        is_coalesced=task.joins_products
        and policy.coalesce != "off"
        and not policy.compile,
        activations_move=policy.activations == "host" and policy.device != "cpu",
    )
    rates = rates_of(machine, policy, dtype, decodes=images is not None)
    return Forecast(arrangement, shape, CostModel(shape, rates, settings), policy)


def kv_itemsize(policy: Policy) -> float | None:
    """The bytes of an element of keys and values as they are kept, with its share of a
    scale (16 bits for 32 elements). None: the size of the dtype that is computed in."""
    return None if policy.kv.dtype == "auto" else 1.0 + 2 / 32


def scoring_of(policy: Policy, lengths: Sequence[int]) -> Scoring:
    """The work of rows of `lengths` tokens that run through the model once, packed as a
    job packs them."""
    groups = pack(lengths, max_tokens=policy.micro_batch_tokens)
    batches = tuple(
        MicroBatchShape(len(group), max(lengths[row] for row in group))
        for group in groups
    )
    return Scoring(
        batches, max(1, policy.tokens_in_flight // policy.micro_batch_tokens)
    )


def scoring_alike(policy: Policy, num_rows: int, length: int) -> Scoring:
    """As `scoring_of`, for `num_rows` rows of `length` tokens each. Planners call it
    many times, with hundreds of thousands of rows."""
    groups = alike(num_rows, length, max_tokens=policy.micro_batch_tokens)
    return Scoring(
        tuple(MicroBatchShape(num, length) for num in groups),
        max(1, policy.tokens_in_flight // policy.micro_batch_tokens),
    )


def generating_of(
    policy: Policy,
    num_rows: int,
    prompt_tokens: int,
    new_tokens: int,
    *,
    in_parts: bool,
) -> Generating:
    """The work of completing `num_rows` prompts of one length. `in_parts`: whether a
    prompt may come in over several calls, as the model's shape says."""
    in_flight = policy.sequences_in_flight
    each = min(policy.micro_batch_sequences, in_flight)
    num_sharing = max(1, min(-(-num_rows // each), in_flight // each))
    rows = min(each, max(1, num_rows))
    chunk = prompt_chunk(policy, rows, num_sharing, in_parts=in_parts)
    if chunk is None:  # then micro_batch_tokens limits each call, too
        each = max(1, min(each, policy.micro_batch_tokens // max(1, prompt_tokens)))
    in_flight = in_flight // each * each
    return Generating(num_rows, prompt_tokens, new_tokens, in_flight, each, chunk)


def dtype_of(recipes: Mapping[str, Recipe]) -> str:
    """The dtype of most elements of `recipes`."""
    nbytes: dict[str, int] = {}
    for recipe in recipes.values():
        name = str(recipe.dtype).removeprefix("torch.")
        nbytes[name] = nbytes.get(name, 0) + math.prod(recipe.shape)
    return max(nbytes, key=lambda name: nbytes[name]) if nbytes else "float32"

"""Chooses what a policy leaves open: what is in flight, and which weights stay in
memory."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Literal

from ...io.errors import DoesNotFitError
from ...io.tier import KV_TIERS
from ...io.weights.recipe import Recipe
from ...scheduler.cost.memory_need import RUNTIME_BYTES, Need
from ...scheduler.cost.shape import ModelShape
from ...scheduler.cost.workload import Generating, Prediction, Scoring, predict
from ..machines.machine import Machine
from ..policy import Policy
from ..tasks.task import Task
from .forecast import Forecast, Forecaster, generating_of, scoring_alike
from .memory_sizes import STEP_BYTES, MemorySizes, is_free
from .planned import USABLE, Budget, Choice, Workload, budget_of, no_place, why_not
from .planned_need import need_of
from .widths import MICRO_BATCHES, MOST_IN_FLIGHT, OF_EXPERTS, WIDTHS

Objective = Literal["throughput", "latency"]
_GOOD_ENOUGH = 0.99  # of the best rate: then less memory wins
_FEW_PARTS, _MANY_PARTS, _EXACT = 8, 1 << 20, 0
"""Sizes of memory are tried in so many parts of what there is; in many for the choice
that is taken, and if the model does not fit into a few; exactly if into these neither.
"""


@dataclass(frozen=True)
class Planner:
    """Plans a workload for one model on one machine. What `policy` sets is kept."""

    module: Any
    recipes: Mapping[str, Recipe]
    machine: Machine
    policy: Policy
    workload: Workload
    objective: Objective = "throughput"
    is_sparing: bool = True
    """Whether weights use no more memory than makes it faster."""
    _known: dict[tuple[Any, ...], Forecast] = field(default_factory=dict)
    _choices: list[Choice] = field(default_factory=list)
    _too_small: list[int] = field(default_factory=list)  # sizes of device_memory

    @cached_property
    def _forecaster(self) -> Forecaster:
        return Forecaster(self.module, self.recipes, self.machine, self.task)

    @property
    def task(self) -> Task:
        return self.workload.task

    def choose(self) -> Choice:
        """The best policy. Raises DoesNotFitError, saying what would make it run."""
        found = self.choices()
        if not found:
            raise DoesNotFitError(self._why_not())
        if self.objective == "latency":
            return self._finer(min(found, key=lambda c: c.prediction.seconds))
        best = max(choice.rate for choice in found)
        good = [c for c in found if c.rate >= _GOOD_ENOUGH * best]
        if self.machine.is_estimate:
            good = [c for c in good if c.is_safe] or good
        least = min(good, key=lambda choice: choice.in_flight)
        return self._less_memory(self._finer(least))

    def choices(self) -> list[Choice]:
        """All policies that fit, each with as much of the model in memory as fits."""
        if not self._choices:
            tried = (self._choice(self._with(s)) for s in self._settings())
            self._choices.extend(choice for choice in tried if choice is not None)
        return self._choices

    def beside(self, start: Choice, policy: Policy) -> Choice | None:
        """The choice for `policy`, which differs a little from that of `start`. It gets
        the same memory, or less where what is in flight leaves less; None where that
        leaves too little."""
        roomy = self._choice(policy)
        if roomy is None or not is_free(self.policy, "device_memory"):
            return roomy
        asked, most = policy.device_memory, roomy.policy.device_memory
        assert asked != "auto", "it was chosen"
        assert most != "auto", "it was chosen"
        if asked > most and asked != start.policy.device_memory:
            return None
        values = {"device_memory": min(asked, most), "host_memory": policy.host_memory}
        return self._evaluate(_updated(roomy.policy, values), roomy.need)

    def under(self, machine: Machine, settings: Mapping[str, Any]) -> "Planner":
        """This planner for another machine and with more settings."""
        policy = _updated(self.policy, settings)
        asked = (machine, policy, self.workload, self.objective, self.is_sparing)
        return Planner(self.module, self.recipes, *asked)

    def with_shared_host(self, choice: Choice, num: int) -> Choice | None:
        """`choice`, made for one of `num` parts of a machine, with one copy of the
        weights in host memory for all parts. None where the user has set its size."""
        if not is_free(self.policy, "host_memory"):
            return None
        own = choice.need.beside_weights(choice.policy.kv.tier, is_shared=False)[1]
        shape = choice.forecast.shape
        left = num * (self.budget.host - own - 3 * shape.largest_bytes)
        kept = max(0, min(shape.streamed_bytes, left)) or None
        values = {"host_memory": kept, "host_shared": kept is not None}
        return self._evaluate(_updated(choice.policy, values), choice.need)

    def most_in_flight(self) -> int:
        """The most tokens (or sequences) in flight that there is memory for."""
        return max((self.task.in_flight(c.policy) for c in self.choices()), default=0)

    @property
    def budget(self) -> Budget:
        """The machine's memory, or the policy's `memory`, less what the runtime
        takes."""
        return budget_of(self.machine, self.policy)

    def _settings(self) -> Iterator[dict[str, Any]]:
        """The settings to try for what is in flight: for latency, one micro-batch."""
        each_name, all_name = self.task.micro_batch_key, self.task.in_flight_key
        unit = self.task.unit_in_flight
        sizes = (OF_EXPERTS if self._whole.has_experts else MICRO_BATCHES)[unit]
        if not is_free(self.policy, each_name):
            sizes = (getattr(self.policy, each_name),)
        elif self.objective == "latency":
            sizes = sizes[:1]
        seen = set()
        for each in sizes:
            widths = WIDTHS if self.objective == "throughput" else (1,)
            totals = [each * width for width in widths]
            most = max(each, MOST_IN_FLIGHT[unit])
            totals = [total for total in totals if total <= most]
            if not is_free(self.policy, all_name):
                totals = [getattr(self.policy, all_name)]
            for total in totals:
                for where in self._places():
                    key = (min(each, total), total, str(where))
                    if key not in seen:
                        seen.add(key)
                        yield {each_name: key[0], all_name: total, **where}

    def _places(self) -> list[dict[str, Any]]:
        """The places to try for activations (or keys and values), the fastest first."""
        is_gpu = self.machine.device_memory is not None
        if not self.task.keeps_kv:
            moves = is_gpu and is_free(self.policy, "activations")
            return [{}, {"activations": "host"}] if moves else [{}]
        if self.policy.kv.tier != "auto" or self.policy.compile:
            return [{}]
        # From a tier slower than one with a limit on, that limit would never matter.
        slowest = min(map(KV_TIERS.index, self.policy.kv.limits), default=len(KV_TIERS))
        tiers = KV_TIERS[0 if is_gpu else 1 : slowest + 1]
        return [{"kv": {"tier": tier.value}} for tier in tiers]

    def _with(self, settings: dict[str, Any]) -> Policy:
        values = self.policy.model_dump(exclude_unset=True)
        kv = settings.pop("kv", None)
        if kv is not None:
            values["kv"] = {**values.get("kv", {}), **kv}
        if self.machine.is_accelerated and "device" not in values:
            values["device"] = self.machine.device
        # Estimates know one reader only: the best is found when loading.
        disk = None if self.machine.is_estimate else self.machine.disk
        if disk is not None and self.policy.io.reader == "auto":
            values["io"] = {**values.get("io", {}), "reader": disk.best_reader}
        return Policy(**{**values, **settings})

    def _finer(self, choice: Choice) -> Choice:
        """`choice` with the memory that it could have, if that is better."""
        finer = choice.asked and self._choice(choice.asked, (_MANY_PARTS,))
        return finer if finer and finer.rate > choice.rate else choice

    def _choice(
        self,
        policy: Policy,
        all_parts: tuple[int, ...] = (_FEW_PARTS, _MANY_PARTS, _EXACT),
    ) -> Choice | None:
        """The choice for `policy`, with as much of the model in memory as fits beside
        what is in flight; None where that leaves too little, or keys and values have no
        place."""
        need = self._need(self._whole, policy)
        if not self.budget.has_place_for(need, policy.kv.tier):
            return None
        for parts in all_parts:
            values = self._sizes.for_need(policy, need, parts)
            if values is None:
                continue
            choice = self._evaluate(_updated(policy, values), need)
            if choice is not None:
                return replace(choice, asked=policy)
        return None

    @cached_property
    def _sizes(self) -> MemorySizes:
        return MemorySizes(self.policy, self.budget, self._whole)

    def _evaluate(self, policy: Policy, need: Need) -> Choice | None:
        size = 0 if policy.device_memory == "auto" else policy.device_memory
        if 0 < size <= max(self._too_small, default=0):
            return None
        try:
            found = self.forecast_for(policy)
            work = self._work(policy, found.shape)
            prediction = self.predicted(policy, found, work)
        except DoesNotFitError:
            self._too_small.append(size)
            return None
        return Choice(policy, found, prediction, need)

    def predicted(
        self, policy: Policy, found: Forecast, work: Scoring | Generating
    ) -> Prediction:
        """What `work` takes under `policy`, whose forecast is `found`."""
        return predict(found.model, work)

    def flops_per_token(self, choice: Choice) -> float:
        """FLOPs of products with weights for each token."""
        return choice.forecast.shape.flops_per_token

    def _work(self, policy: Policy, shape: ModelShape) -> Scoring | Generating:
        """The work that is predicted: as much as is in flight, several times."""
        length = self.workload.row_tokens
        if self.task.keeps_kv:
            num_rows = policy.sequences_in_flight
            return generating_of(
                policy,
                num_rows,
                length,
                self.task.new_tokens,
                in_parts=shape.prompts_in_parts,
            )
        times = 8 if self.objective == "throughput" else 1
        rows = max(1, policy.tokens_in_flight // length) * times
        return scoring_alike(policy, rows, length)

    def _need(self, shape: ModelShape, policy: Policy) -> Need:
        return need_of(shape, policy, self.workload, is_shared=self.budget.is_shared)

    @cached_property
    def _whole(self) -> ModelShape:
        """The model's shape with a working set that holds all of it."""
        whole = sum(recipe.nbytes for recipe in self.recipes.values())
        roomy = {"device_memory": 2 * whole + (64 << 20), "memory": "auto"}
        policy = _updated(self._with({}), {**roomy, "placement": {}})
        return self.forecast_for(policy).shape

    def forecast_for(self, policy: Policy) -> Forecast:
        """The forecast for `policy`. It is computed once for each division of memory:
        what is in flight does not change it."""
        memory = (policy.device, policy.device_memory, policy.host_memory)
        ways = (policy.lookahead, policy.coalesce, policy.activations, policy.io.reader)
        key = (*memory, *ways)
        known = self._known.get(key)
        if known is None:
            known = self._known[key] = self._forecaster.forecast(policy)
        settings = replace(known.model.settings, kv_tier=policy.kv.tier)
        return replace(
            known, policy=policy, model=replace(known.model, settings=settings)
        )

    def _less_memory(self, best: Choice) -> Choice:
        """`best` with less of the model in memory, where that is as fast: the largest
        part, and room for those that are loaded meanwhile."""
        if not (self.is_sparing and is_free(self.policy, "device_memory")):
            return best
        shape = best.forecast.shape
        least = shape.resident_bytes + (1 + best.policy.lookahead) * shape.largest_bytes
        least = -(-least // STEP_BYTES) * STEP_BYTES
        asked = best.policy.device_memory
        assert asked != "auto", "it was chosen"
        for size in (least, (least + asked) // 2 // STEP_BYTES * STEP_BYTES):
            if size < asked:
                smaller = _updated(best.policy, {"device_memory": size})
                choice = self._evaluate(smaller, best.need)
                if choice is not None and choice.rate >= _GOOD_ENOUGH * best.rate:
                    return choice
        return best

    def _why_not(self) -> str:
        """Why nothing fits, and what would make it run."""
        smallest = self._with(next(iter(self._settings())))
        name, key, budget = self.machine.name, "device_memory", self.budget
        need = self._need(self._whole, smallest)
        least = self._forecaster.least_bytes(smallest)
        held = need.activations + need.states
        if not budget.has_place_for(need, "disk") and held + least <= budget.device:
            return no_place(name, self.task.in_flight(smallest), need, budget)
        asked = None if is_free(self.policy, key) else self.policy.device_memory
        beside = held + need.kv
        if (why := self._sizes.why_host_does_not(need, least, name)) is not None:
            return why
        whole = round((least + beside + RUNTIME_BYTES) / USABLE)
        return why_not(name, asked, least, beside, budget.device, whole_bytes=whole)


def _updated(policy: Policy, values: Mapping[str, Any]) -> Policy:
    return Policy(**{**policy.model_dump(exclude_unset=True), **values})

"""A plan: the resolved policy, bytes per tier, the predicted speed, and why."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import yaml

from ...io.errors import PolicyError
from ...scheduler.cost.worth import cost_per_million, utilisation
from ..configs.opening import open_model
from ..machines.estimates import estimated_machine
from ..machines.machine import Machine, check_runs
from ..policy import Policy
from ..startup import rare_collections
from ..tasks.task import Task
from ..weights.blueprint import blueprint
from .devices import Devices
from .dtypes import (
    HALF,
    WIDE,
    DtypeChoice,
    choose_dtype,
    dtypes_beside,
    try_dtype,
)
from .forecast import dtype_of
from .host_experts import ExpertsChoice, choose_experts
from .planned import Choice, Workload
from .planner import Objective, Planner
from .rank_plans import rank_sentences, shared_planner
from .ranked import RankGroup, alone
from .rates import peak_flops
from .ways import devices_of
from .words import dtype_sentences, explain, kept_words


@dataclass(frozen=True)
class Plan:
    """What the planner chose for one model, machine and workload."""

    model: Path
    machine: Machine
    workload: Workload
    asked: Policy
    """The policy as the user set it."""
    dtypes: DtypeChoice
    has_weights: bool
    ranks: RankGroup | None = None
    """The ranks that share the model; None: one process has it."""

    @property
    def task(self) -> Task:
        return self.workload.task

    @property
    def planner(self) -> Planner:
        """The planner for the dtype that was chosen."""
        return self.dtypes.taken.planner

    @property
    def choice(self) -> Choice:
        found = self.dtypes.taken.choice
        assert found is not None, "what is taken fits"
        return found

    @property
    def dtype(self) -> str:
        """The dtype that most of the model computes in."""
        return self.dtypes.taken.dtype

    @property
    def policy(self) -> Policy:
        """The resolved policy."""
        found = self.choice.policy
        values: dict[str, Any] = {}
        if found.experts != self.experts.experts:
            values["experts"] = self.experts.experts
        if self.ranks is not None:
            values["ranks"] = self.asked.ranks or "pipeline"
        if not values:
            return found
        return Policy(**{**found.model_dump(exclude_unset=True), **values})

    @cached_property
    def experts(self) -> ExpertsChoice:
        """Where experts are computed."""
        return choose_experts(self.choice.forecast, self.machine, self.dtype)

    @cached_property
    def devices(self) -> Devices | None:
        """The ways to use several devices or ranks; None where there is one."""
        deal = partial(shared_planner, self.model)
        return devices_of(self.planner, self.choice, deal, self.ranks)

    @property
    def utilisation(self) -> float:
        """Model FLOPs utilisation of the devices that compute, 0 to 1."""
        num = 1
        if self.ranks is not None:
            num = (
                self.ranks.num if self.machine.is_accelerated else self.ranks.num_nodes
            )
        return utilisation(
            self.choice.prediction.tokens_per_second,
            self.planner.flops_per_token(self.choice),
            num * peak_flops(self.machine, self.dtype),
        )

    @property
    def cost_per_million(self) -> float | None:
        """The price of a million tokens; None without a price."""
        price, num = self.machine.price_per_hour, 1
        if self.ranks is not None:
            num = self.ranks.num_nodes
        return cost_per_million(
            None if price is None else price * num, self.choice.rate
        )

    @property
    def title(self) -> str:
        """The model and the machine, in one line."""
        alone = "" if self.has_weights else " (by its config.json alone)"
        how = f" ({self.machine.source})" if self.machine.is_estimate else ""
        return f"{self.model}{alone} on {self.machine.name}{how}"

    @property
    def sentences(self) -> list[str]:
        """What limits the speed, and what would change it."""
        is_open = self.asked.dtype == "auto"
        return [
            *explain(self.planner, self.choice),
            *rank_sentences(self.planner, self.choice),
            *filter(None, [self.experts.sentence]),
            *dtype_sentences(self.dtypes, is_open=is_open),
            *kept_words(self.asked),
        ]

    def to_yaml(self) -> str:
        """The resolved policy, as `--policy` takes it, with the plan in comments."""
        prediction = self.choice.prediction
        lines = [
            f"# {self.title}",
            f"# predicted: {self.choice.rate:,.1f} "
            f"{self.task.rate_unit}, {prediction.binds} binds",
            *(f"# {sentence}" for sentence in self.sentences),
        ]
        values = self.policy.model_dump(mode="json", exclude_unset=True)
        return "\n".join(lines) + "\n" + yaml.safe_dump(values, sort_keys=False)

    def to_json(self) -> dict[str, Any]:
        """The values for `--json`. Sizes are in bytes, times in seconds."""
        found = self.choice.prediction
        tiers = self.choice.forecast.bytes_by_tier
        return {
            "model": str(self.model),
            "has_weights": self.has_weights,
            "machine": self.machine.name,
            "is_estimate": self.machine.is_estimate,
            "dtype": self.dtype,
            "task": self.task.name,
            "tokens_per_second": found.tokens_per_second,
            "output_tokens_per_second": found.output_tokens_per_second,
            "pass_seconds": found.pass_seconds,
            "compute_seconds_per_pass": found.compute_seconds,
            "wait_seconds_per_pass": found.wait_seconds,
            "mfu": self.utilisation,
            "cost_per_million_tokens": self.cost_per_million,
            "ranks": None if self.ranks is None else self.ranks.num,
            "binds": found.binds,
            "bytes_by_tier": tiers,
            "activation_bytes": self.choice.need.activations,
            "waiting_activation_bytes": self.choice.need.waiting,
            "kv_bytes": self.choice.need.kv,
            "state_bytes": self.choice.need.states,
            "kv_tier": self.policy.kv.tier,
            "because": self.sentences,
            "devices": self.devices.to_json() if self.devices else None,
            "policy": self.policy.model_dump(mode="json", exclude_unset=True),
        }


@rare_collections()
def make_plan(
    model: Path,
    policy: Policy,
    machine: Machine | None,
    workload: Workload,
    objective: Objective = "throughput",
    *,
    host_bytes: int | None = None,
    is_sparing: bool = True,
    ranks: RankGroup | None = None,
    price_per_hour: float | None = None,
) -> Plan:
    """Plans `workload` with the checkpoint in `model`; its config.json is enough.
    Chooses a dtype, too, where the policy leaves it open.

    A `machine` of None stands for this computer, by quick estimates that take about a
    second (CPUs only). `host_bytes` is the most host memory that the process may have;
    None: all there is. With `is_sparing`, weights take no more memory than makes it
    faster; else they take what there is. `ranks` share the model, on as many machines
    as they say, each like `machine`. `price_per_hour` is that of the
    machine, instead of the one in its file.

    Raises DoesNotFitError (with what would make it run), PolicyError, CheckpointError
    and UsageError.
    """
    if machine is not None:
        check_runs(machine)
    skeleton, has_weights = blueprint(
        model, policy.dtype, trust_remote_code=policy.trust_remote_code
    )
    workload.task.check_model(skeleton.model)
    own = dtype_of(skeleton.recipes)
    device = policy.device if machine is None else machine.device
    beside = dtypes_beside(own, device)
    if machine is None:
        machine = estimates_of(model, policy, (own, *beside), has_weights=has_weights)
    if price_per_hour is not None:
        machine = machine.model_copy(update={"price_per_hour": price_per_hour})
    if host_bytes is not None:
        host = min(machine.host_memory, host_bytes)
        machine = machine.model_copy(update={"host_memory": host})
    if ranks is not None:
        # What contradicts ranks is refused.
        shared = {"ranks": policy.ranks or "pipeline", "device": machine.device}
        Policy(**{**policy.model_dump(exclude_unset=True), **shared})
    planner = Planner(
        skeleton.model,
        skeleton.recipes,
        machine,
        alone(policy),
        workload,
        objective,
        is_sparing,
    )

    def dealt(whole: Planner) -> Planner:
        if ranks is None:
            return whole
        return shared_planner(model, whole, ranks, policy.ranks or "pipeline")

    found = plan_dtypes(model, planner, own, dealt)
    return Plan(model, machine, workload, policy, found, has_weights, ranks)


def plan_dtypes(
    model: Path, planner: Planner, own: str, dealt: Callable[[Planner], Planner]
) -> DtypeChoice:
    """Chooses among `own`, which `planner` plans for, and the dtypes to try beside it.
    `dealt` makes planners for ranks of those for one process."""
    machine, asked = planner.machine, planner.policy
    others = []
    for name in dtypes_beside(own, machine.device):
        if name in machine.matmul:
            made, _ = blueprint(model, name, trust_remote_code=asked.trust_remote_code)
            beside = replace(
                planner,
                module=made.model,
                recipes=made.recipes,
                policy=with_dtype(asked, name),
                _known={},
                _choices=[],
                _too_small=[],
            )
            others.append(try_dtype(name, dealt(beside)))
    is_open = asked.dtype == "auto"
    return choose_dtype(
        try_dtype(own, dealt(planner)), others, machine, is_open=is_open
    )


def with_dtype(policy: Policy, dtype: str) -> Policy:
    """`policy` with `dtype`."""
    return Policy(**{**policy.model_dump(exclude_unset=True), "dtype": dtype})


def estimates_of(
    model: Path, policy: Policy, dtypes: Iterable[str], *, has_weights: bool
) -> Machine:
    """Quick estimates of this computer, with the drive of the checkpoint in `model`.
    Raises PolicyError for a GPU: only `penstock machine` measures those."""
    if policy.device != "cpu":
        raise PolicyError(
            f"no machine file, and quick estimates are of CPUs: run penstock machine "
            f"--device {policy.device}, which measures it once, or give --machine"
        )
    files = open_model(model).stamps if has_weights else {}
    known = [name for name in dtypes if name in (WIDE, *HALF)] or [WIDE]
    try:
        return estimated_machine(known, files, policy.io)
    except OSError as error:
        raise PolicyError(
            f"no machine file, and the drive of {model} cannot be estimated "
            f"({error.strerror or error}): run penstock machine, or give --machine"
        ) from error

"""A plan: the resolved policy, bytes per tier, what it will do, and why."""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml

from ...io.checkpoint.index import open_checkpoint
from ...io.errors import PolicyError
from ..machines.estimates import estimated_machine
from ..machines.machine import Machine
from ..policy import Policy
from ..tasks.generate import check_generates
from ..tasks.head import check_causal
from ..units.model_kind import base_of
from ..weights.blueprint import blueprint
from .devices import Devices, devices_of
from .dtypes import (
    HALF,
    WIDE,
    DtypeChoice,
    choose_dtype,
    dtypes_beside,
    try_dtype,
)
from .forecast import dtype_of
from .planner import Choice, Objective, Planner, Task
from .words import dtype_sentences, explain, kept_words


@dataclass(frozen=True)
class Plan:
    """What the planner made of a policy for one model, machine and task."""

    model: Path
    machine: Machine
    task: Task
    asked: Policy
    """What the user set."""
    dtypes: DtypeChoice
    has_weights: bool

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
        """That most of the model computes in."""
        return self.dtypes.taken.dtype

    @property
    def policy(self) -> Policy:
        """The resolved one."""
        return self.choice.policy

    @cached_property
    def devices(self) -> Devices | None:
        """What the machine's devices could do together; None where it has one."""
        return devices_of(self.planner, self.choice)

    @property
    def title(self) -> str:
        """What is planned for, in one line."""
        alone = "" if self.has_weights else " (by its config.json alone)"
        how = f" ({self.machine.source})" if self.machine.is_estimate else ""
        return f"{self.model}{alone} on {self.machine.name}{how}"

    @property
    def sentences(self) -> list[str]:
        """What binds, and what would change it."""
        is_open = self.asked.dtype == "auto"
        return [
            *explain(self.planner, self.choice),
            *dtype_sentences(self.dtypes, is_open=is_open),
            *kept_words(self.asked),
        ]

    def to_yaml(self) -> str:
        """The resolved policy, as `--policy` takes it, with the plan in comments."""
        prediction = self.choice.prediction
        lines = [
            f"# {self.title}",
            f"# predicted: {self.choice.rate:,.1f} "
            f"{'output tokens/s' if self.task.generates else 'tokens/s'}, "
            f"{prediction.binds} binds",
            *(f"# {sentence}" for sentence in self.sentences),
        ]
        values = self.policy.model_dump(mode="json", exclude_unset=True)
        return "\n".join(lines) + "\n" + yaml.safe_dump(values, sort_keys=False)

    def to_json(self) -> dict[str, Any]:
        """Sizes in bytes, times in seconds."""
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
            "binds": found.binds,
            "bytes_by_tier": tiers,
            "activation_bytes": self.choice.need.activations,
            "waiting_activation_bytes": self.choice.need.waiting,
            "kv_bytes": self.choice.need.kv,
            "kv_tier": self.policy.kv.tier,
            "because": self.sentences,
            "devices": self.devices.to_json() if self.devices else None,
            "policy": self.policy.model_dump(mode="json", exclude_unset=True),
        }


def make_plan(
    model: Path,
    policy: Policy,
    machine: Machine | None,
    task: Task,
    objective: Objective = "throughput",
    *,
    host_bytes: int | None = None,
    is_sparing: bool = True,
) -> Plan:
    """Plans `task` with the checkpoint in `model`, of which config.json is enough.
    Without a `machine`, for quick estimates of this computer, which take about a second
    (CPUs only). A dtype that the policy leaves open is chosen, too. `host_bytes`: most
    of the host's memory that the process may have (None: all there is); not
    `is_sparing`: weights take what there is, even where that is no faster. Raises
    DoesNotFitError (with what would make it run), PolicyError, CheckpointError and
    UsageError."""
    if machine is not None:
        check_runs(machine)
    skeleton, has_weights = blueprint(
        model, policy.dtype, trust_remote_code=policy.trust_remote_code
    )
    check_does(skeleton.model, task)
    own = dtype_of(skeleton.recipes)
    device = policy.device if machine is None else machine.device
    beside = dtypes_beside(own, device)
    if machine is None:
        machine = estimates_of(model, policy, (own, *beside), has_weights=has_weights)
    if host_bytes is not None:
        host = min(machine.host_memory, host_bytes)
        machine = machine.model_copy(update={"host_memory": host})
    planner = Planner(
        skeleton.model, skeleton.recipes, machine, policy, task, objective, is_sparing
    )
    found = plan_dtypes(model, planner, own)
    return Plan(model, machine, task, policy, found, has_weights)


def plan_dtypes(model: Path, planner: Planner, own: str) -> DtypeChoice:
    """The dtype that is fastest, of those that come into question beside `own`, which
    is what `planner` plans for."""
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
            )
            others.append(try_dtype(name, beside))
    is_open = asked.dtype == "auto"
    return choose_dtype(try_dtype(own, planner), others, machine, is_open=is_open)


def with_dtype(policy: Policy, dtype: str) -> Policy:
    """`policy`, computing in `dtype`."""
    return Policy(**{**policy.model_dump(exclude_unset=True), "dtype": dtype})


def estimates_of(
    model: Path, policy: Policy, dtypes: Iterable[str], *, has_weights: bool
) -> Machine:
    """Quick estimates of this computer, for what the checkpoint in `model` needs.
    Raises PolicyError for a GPU, which only `penstock machine` measures."""
    if policy.device != "cpu":
        raise PolicyError(
            f"no machine file, and quick estimates are of CPUs: run penstock machine "
            f"--device {policy.device}, which measures it once, or give --machine"
        )
    files = open_checkpoint(model).stamps if has_weights else {}
    known = [name for name in dtypes if name in (WIDE, *HALF)] or [WIDE]
    try:
        return estimated_machine(known, files, policy.io)
    except OSError as error:
        raise PolicyError(
            f"no machine file, and the drive of {model} cannot be estimated "
            f"({error.strerror or error}): run penstock machine, or give --machine"
        ) from error


def check_does(model: Any, task: Task) -> None:
    """Raises UsageError for a task that is not the model's."""
    if task.embeds:
        base_of(model)
    elif task.generates:
        check_generates(model)
    else:
        check_causal(model)


def check_runs(machine: Machine) -> None:
    """Raises PolicyError for machines that only the formulas know."""
    if machine.device == "tpu":
        raise PolicyError(
            f"machine {machine.name!r} is for the formulas alone: Penstock computes on "
            "CPUs and GPUs; take another machine"
        )
    if machine.disk is None:
        raise PolicyError(
            f"machine {machine.name!r} has no disk to read weights from: give its file "
            "a section disk"
        )

"""A plan: the resolved policy, bytes per tier, what it will do, and why."""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml

from ...io.errors import PolicyError
from ..machines.machine import Machine
from ..policy import Policy
from ..tasks.generate import check_generates
from ..tasks.head import check_causal
from ..units.hidden import base_of
from ..weights.blueprint import blueprint
from .devices import Devices, devices_of
from .planner import Choice, Objective, Planner, Task
from .words import explain


@dataclass(frozen=True)
class Plan:
    """What the planner made of a policy for one model, machine and task."""

    model: Path
    machine: Machine
    task: Task
    planner: Planner
    choice: Choice
    has_weights: bool

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
        return f"{self.model}{alone} on {self.machine.name}"

    @property
    def sentences(self) -> list[str]:
        """What binds, and what would change it."""
        return explain(self.planner, self.choice)

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
    machine: Machine,
    task: Task,
    objective: Objective = "throughput",
) -> Plan:
    """Plans `task` with the checkpoint in `model`, of which config.json is enough.
    Raises DoesNotFitError (with what would make it run), PolicyError, CheckpointError
    and UsageError."""
    check_runs(machine)
    skeleton, has_weights = blueprint(
        model, policy.dtype, trust_remote_code=policy.trust_remote_code
    )
    check_does(skeleton.model, task)
    planner = Planner(
        skeleton.model, skeleton.recipes, machine, policy, task, objective
    )
    return Plan(model, machine, task, planner, planner.choose(), has_weights)


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

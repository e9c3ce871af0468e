"""Tries settings with the planner before they are advised."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...io.errors import PenstockError
from ..machines.machine import Machine
from ..policy import Policy
from ..weights.blueprint import blueprint
from .planned import Choice, Workload
from .planner import Planner
from .rank_plans import shared_planner
from .ranked import RankGroup, alone


@dataclass(frozen=True)
class PlanTrial:
    """The checkpoint `model` on a machine, under `policy`: what the user set and what
    was chosen."""

    model: Path
    policy: Policy
    machine: Machine
    workload: Workload
    ranks: RankGroup | None = None
    """The ranks that share the model; None: one process has it."""

    def __call__(self, settings: Mapping[str, Any]) -> Choice | None:
        """The choice for the policy with `settings`; None where that does not fit or is
        no valid policy."""
        try:
            values = self.policy.model_dump(exclude_unset=True)
            policy = Policy(**_merged(values, settings))
            skeleton, _ = blueprint(
                self.model,
                policy.dtype,
                trust_remote_code=policy.trust_remote_code,
            )
            planner: Planner = Planner(
                skeleton.model,
                skeleton.recipes,
                self.machine,
                alone(policy),
                self.workload,
                is_sparing=False,
            )
            if self.ranks is not None:
                mode = policy.ranks or "pipeline"
                planner = shared_planner(self.model, planner, self.ranks, mode)
            return planner.choose()
        except PenstockError:
            return None


def _merged(values: Mapping[str, Any], settings: Mapping[str, Any]) -> dict[str, Any]:
    """`values` with `settings`, which win. Sections are merged key by key."""
    found = dict(values)
    for key, value in settings.items():
        old = found.get(key)
        if isinstance(old, Mapping) and isinstance(value, Mapping):
            value = _merged(old, value)
        found[key] = value
    return found

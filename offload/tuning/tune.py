"""The measured search around a plan: `penstock tune`."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from ...io.errors import DoesNotFitError, MachineError, PolicyError
from ..jobs.identity import model_digests
from ..plans.plan import Plan
from ..plans.planned import Choice, Workload
from ..plans.words import prediction_busy
from ..policy import Policy
from .candidates import Around, candidates, widest
from .log import TuneLog
from .race import START, Heat, Settings, Timing, Verdict, heats_left, next_heat
from .slices import RowSample, Slice, measured_rate, predicted_rate

Measure = Callable[[Path, Policy, Slice], float]
"""Returns the tokens a second of a checkpoint under a policy, for a slice."""
_OUT = (DoesNotFitError, MachineError, PolicyError, MemoryError, torch.OutOfMemoryError)
"""The errors that take a candidate out of the race instead of ending it."""
_HIDDEN_PART = 0.2
"""The share of a pass below which loading weights is hidden by computing, even where
the plan is a few times too optimistic."""
_KEYS = (
    "micro_batch_tokens",
    "tokens_in_flight",
    "micro_batch_sequences",
    "sequences_in_flight",
    "device_memory",
    "host_memory",
    "lookahead",
    "coalesce",
    "io.reader",
    "io.threads",
    "io.depth",
)


@dataclass
class Tuning:
    """A search around `plan`, with measurements on slices of `sample`."""

    plan: Plan
    sample: RowSample
    measure: Measure = measured_rate
    tried: list[Settings] = field(init=False)
    """The settings that are tried beside the start."""

    def __post_init__(self) -> None:
        self._around = around(self.plan)
        self.tried = candidates(self._around)
        self._widest = widest(self._around, self.tried)
        self._choices: dict[Settings, Choice] = {START: self.plan.choice}

    @property
    def job(self) -> dict[str, Any]:
        """What identifies this search, as JSON has it."""
        return {
            "model": model_digests(self.plan.model),
            "policy": _dumped(self.plan.planner.policy),
            "start": _dumped(self.plan.policy),
            "task": _identity(self.plan.workload),
            "input": dict(self.sample.identity),
        }

    def slice_of(self, slices: int) -> Slice:
        """The same rows for every candidate: enough for a pass of the widest one."""
        return self.sample.cut(self.plan.task, self._widest, slices)

    def choice(self, settings: Settings) -> Choice:
        """The plan with `settings` instead of the start's. Raises DoesNotFitError and
        PolicyError."""
        if settings not in self._choices:
            policy = with_settings(self.plan.policy, settings)
            found = self.plan.planner.beside(self.plan.choice, policy)
            if found is None:
                raise DoesNotFitError(
                    "there is no memory for it beside what is in flight, by the plan "
                    f"for {self.plan.machine.name}"
                )
            self._choices[settings] = found
        return self._choices[settings]

    def run(self, log: TuneLog) -> Iterator[Timing | Verdict]:
        """Measures what is not in `log` yet. Yields each timing once it is kept there,
        and the verdict at the end. Raises what the start raises."""
        while isinstance(step := next_heat(self.tried, log.timings), Heat):
            timing = self._timing(step)
            log.add(timing)
            yield timing
        yield step

    def _timing(self, heat: Heat) -> Timing:
        work = self.slice_of(heat.slices)
        try:
            policy = self.choice(heat.settings).policy
            rate = self.measure(self.plan.model, policy, work)
        except _OUT as error:
            if heat.settings == START:
                raise
            text = f"{error}" or type(error).__name__
            return Timing(heat.settings, heat.rung, heat.lap, None, text)
        return Timing(heat.settings, heat.rung, heat.lap, rate)

    def predicted_seconds(self, timings: list[Timing]) -> float | None:
        """The seconds that the rest of the search takes, without loading, if all
        candidates are as fast as the start by its plan; None where the plan predicts
        nothing."""
        work = self.slice_of(1)
        rate = predicted_rate(self.plan.choice, work)
        return self.slices_left(timings) * work.num_tokens / rate if rate else None

    def slices_left(self, timings: list[Timing]) -> int:
        """The measurements that are left, counted in the shortest slices."""
        return sum(heat.slices for heat in heats_left(self.tried, timings))


def around(plan: Plan) -> Around:
    """What the search may change of `plan`."""
    policy, asked = plan.policy, plan.planner.policy
    costs = plan.choice.forecast.model
    busy, whole = prediction_busy(plan.choice), plan.choice.prediction.pass_seconds
    disk = plan.machine.disk
    return Around(
        values={key: _value(policy, key) for key in _KEYS},
        is_open=frozenset(key for key in _KEYS if _is_open(asked, key)),
        micro_batch_key=plan.task.micro_batch_key,
        in_flight_key=plan.task.in_flight_key,
        joins_products=plan.task.joins_products,
        waits_for_links=busy > _HIDDEN_PART * whole,
        is_compiled=policy.compile,
        readers={} if disk is None else dict(disk.bandwidth),
        least_bytes=costs.shape.resident_bytes + 2 * costs.shape.largest_bytes,
    )


def _identity(workload: Workload) -> dict[str, Any]:
    """What identifies the workload. Those of `score` and `generate` have no name, since
    logs of older versions have none."""
    task = workload.task
    found = {
        "generates": task.keeps_kv,
        "prompt_tokens": workload.row_tokens,
        "new_tokens": task.new_tokens,
    }
    return found if task.name in ("score", "generate") else {"name": task.name, **found}


def with_settings(policy: Policy, settings: Settings) -> Policy:
    """`policy` with `settings`. Raises PolicyError."""
    values = policy.model_dump(exclude_unset=True)
    for key, value in settings:
        section, _, inner = key.rpartition(".")
        if section:
            values[section] = {**values.get(section, {}), inner: value}
        else:
            values[key] = value
    return Policy(**values)


def _value(policy: Policy, key: str) -> Any:
    found: Any = policy
    for part in key.split("."):
        found = getattr(found, part)
    return found


def _is_open(policy: Policy, key: str) -> bool:
    """Whether the user did not set `key`, or set it to auto."""
    section, _, inner = key.rpartition(".")
    owner = policy.io if section == "io" else policy
    is_set = inner in owner.model_fields_set
    return not is_set or _value(policy, key) == "auto"


def _dumped(policy: Policy) -> dict[str, Any]:
    return policy.model_dump(mode="json", exclude_unset=True)

"""Chooses what a job's policy leaves open, before its model is loaded."""

import json
from collections.abc import Iterable, Mapping
from contextlib import closing
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import psutil
from rich.console import Console

from ...io.errors import DoesNotFitError, PenstockError, PolicyError
from ..files.inputs import Inputs
from ..files.parts import Position
from ..machines.computer import has_dtype
from ..machines.machine import Machine, find_machine
from ..monitoring.memory import installed_bytes
from ..monitoring.show import human_bytes
from ..plans.dtypes import dtype_words
from ..plans.plan import Plan, make_plan
from ..plans.planned import Workload
from ..plans.prediction import predicted, predicted_of_ranks
from ..plans.ranked import RankedPlanner, RankGroup
from ..plans.tensor_ranked import TensorPlanner
from ..plans.trial import PlanTrial
from ..policy import Policy
from ..settings.memory_budget import MemoryRoom
from ..settings.room import coming_with, room_for
from ..tasks.task import Task
from .computed import Loaded

KEPT = (
    "dtype",
    "micro_batch_tokens",
    "tokens_in_flight",
    "micro_batch_sequences",
    "sequences_in_flight",
    "experts",
)
"""The chosen keys that decide on the last bits of results. A job that goes on keeps
their values."""
_TEXTS = ("text", "prompt", "completion", "messages")
_LOOKED_AT = 64
_LETTERS_PER_TOKEN = 4.0
_USUAL_TOKENS = 128


@dataclass(frozen=True, slots=True)
class Chosen:
    """What a job runs with."""

    policy: Policy
    """The user's policy, with values for what was left open."""
    plan: Plan | None = None
    room: MemoryRoom | None = None
    note: str = ""
    """Why nothing was planned; "" where there is a plan."""
    is_begun: bool = False
    """Whether the values were chosen when the job began, and it goes on with them."""

    @property
    def machine(self) -> Machine | None:
        """The machine that is predicted for; None without a plan."""
        return None if self.plan is None else self.plan.machine

    @property
    def ranked(self) -> RankedPlanner | TensorPlanner | None:
        """What planned for several ranks; None where one process was planned for."""
        planner = None if self.plan is None else self.plan.planner
        if isinstance(planner, RankedPlanner | TensorPlanner):
            return planner
        return None

    def predicted(
        self, task: Task, loaded: Loaded, counts: Mapping[str, Any]
    ) -> dict[str, Any]:
        """The prediction for a job with these `counts`, for its report; or `note`,
        which says why there is none."""
        machine = self.machine
        if machine is None:
            return {"note": self.note}
        engine = loaded.engine
        if engine.exchange is None:
            arrangement = engine.arrangement
            return predicted(
                task, loaded.model, arrangement, self.policy, machine, counts
            )
        if self.ranked is None:
            return {"note": "the plan is for one process: nothing is predicted"}
        return predicted_of_ranks(task, self.ranked, engine.policy, counts)

    def trial(self, model: Path, asked: Policy) -> PlanTrial | None:
        """Tries advice for a user who `asked` for this; None without a plan."""
        if self.plan is None:
            return None
        settings = {key: getattr(self.policy, key) for key in left_open(asked)}
        return PlanTrial(
            model,
            _with(asked, settings),
            self.plan.machine,
            self.plan.workload,
            self.plan.ranks,
        )

    @property
    def words(self) -> str:
        """What was chosen and why, in one line."""
        if self.plan is None or self.room is None:
            return self.note
        return ", ".join(_words(self.plan, self.room, is_begun=self.is_begun))


def say_chosen(chosen: Chosen, console: Console, *, as_json: bool) -> None:
    """Prints what was chosen, in one line."""
    says = f"penstock: {chosen.words}"
    if as_json:
        says = json.dumps({"stage": "loading", "chosen": chosen.words})
    console.out(says, highlight=False)


def left_open(asked: Policy) -> tuple[str, ...]:
    """The keys of `KEPT` that the user leaves to Penstock. Pure."""
    return tuple(key for key in KEPT if _is_open(asked, key))


def _is_open(asked: Policy, key: str) -> bool:
    value = getattr(asked, key)
    if key == "experts":  # by default they are computed on the device
        return bool(value == "host")
    return key not in asked.model_fields_set or value == "auto"


def kept_of(asked: Policy, chosen: Policy) -> dict[str, Any]:
    """The chosen values that a job's manifest keeps. Pure."""
    return {key: getattr(chosen, key) for key in left_open(asked)}


def restored(asked: Policy, kept: Mapping[str, Any]) -> Policy:
    """`asked` with the values that were chosen when the job began. Keys that the user
    sets now win. Pure."""
    return _with(asked, {key: kept[key] for key in left_open(asked) if key in kept})


def choose(
    model: Path,
    asked: Policy,
    workload: Workload,
    *,
    num: int = 1,
    ranks: RankGroup | None = None,
) -> Chosen:
    """Chooses what `asked` leaves open, for the checkpoint `model` on one of `num`
    processes, or on `ranks` that share it. The planner uses the file of `penstock
    machine`, or quick estimates of this computer. Raises CheckpointError and UsageError
    for a checkpoint that is wrong."""
    machine = find_machine(None, asked.io.cache)
    if machine is not None and machine.device != asked.device.partition(":")[0]:
        machine = None
    if machine is None and asked.device != "cpu":
        return Chosen(asked, note=_NO_GPU.format(asked.device))
    pinned = _with(asked, {"device": asked.device})
    room = room_for(asked, coming_with(model))
    try:
        plan = make_plan(
            model,
            pinned,
            machine,
            workload,
            host_bytes=room.total // num,
            is_sparing=False,
            ranks=ranks,
        )
    except (DoesNotFitError, PolicyError) as error:
        # The planner only estimates memory: loading the model decides.
        return Chosen(asked, note=f"nothing is planned or predicted: {error}")
    return Chosen(_resolved(asked, plan), plan, room)


def mean_length(inputs: Inputs, keys: Iterable[str]) -> int:
    """The mean number of tokens of a row, estimated from the letters of the first rows
    in the keys that all tasks know, and in `keys`. For a stream, whose rows can be read
    only once, it is 128."""
    if inputs.is_stream:
        return _USUAL_TOKENS
    known = {*_TEXTS, *keys}
    try:
        with closing(inputs.rows(Position())) as found:
            letters = [_letters(row.row, known) for row in islice(found, _LOOKED_AT)]
    except PenstockError:  # raised again when all rows are read
        return _USUAL_TOKENS
    mean = sum(letters) / len(letters) if any(letters) else 0.0
    return max(8, round(mean / _LETTERS_PER_TOKEN)) if mean else _USUAL_TOKENS


def _letters(row: Mapping[str, Any], keys: Iterable[str]) -> int:
    return sum(len(str(row[key])) for key in keys if key in row)


OLDER = "the job was begun by a version that chose nothing, and goes on as it was"
_NO_GPU = (
    "nothing is planned or predicted: run penstock machine --device {}, once, which "
    "measures it"
)


def _resolved(asked: Policy, plan: Plan) -> Policy:
    """`asked` with the plan's values for what it leaves open, except memory: that is
    divided when the model is loaded, by what is free then."""
    found = plan.policy.model_dump(mode="json", exclude_unset=True)
    values = {key: found[key] for key in KEPT if key in found}
    if asked.dtype == "auto":
        values["dtype"] = plan.dtype
    given = asked.model_dump(mode="json", exclude_unset=True)
    return _with(asked, {k: v for k, v in values.items() if given.get(k) != v})


def _with(policy: Policy, values: Mapping[str, Any]) -> Policy:
    """`policy` with `values`. It still knows where the user wrote each key, for error
    messages."""
    settings = [f"{key}={json.dumps(value)}" for key, value in values.items()]
    return policy.with_settings(settings) if settings else policy


def _words(plan: Plan, room: MemoryRoom, *, is_begun: bool) -> list[str]:
    choice, policy = plan.choice, plan.policy
    is_here = plan.machine.device == "cpu"
    lacks = is_here and not has_dtype(plan.dtypes.own.dtype)
    is_open = plan.asked.dtype == "auto"
    dtype = f"{plan.dtype} (as the job began)"
    if not is_begun:
        dtype = dtype_words(plan.dtypes, is_open=is_open, lacks=lacks)
    found = [f"computing in {dtype}"]
    if is_here:
        found.append(f"in {human_bytes(room.total)} of memory ({_why(room)})")
    task = plan.task
    found.append(f"{task.in_flight(policy):,} {task.unit_in_flight} a pass")
    by = " (quick estimate)" if plan.machine.is_estimate else ""
    binds = "computing" if choice.prediction.binds == "compute" else ""
    rate = f"{choice.rate:,.0f}" if choice.rate >= 10 else f"{choice.rate:.1f}"
    found.append(f"predicted {rate} tokens/s{by}")
    found.append(f"{binds or choice.prediction.binds} binds")
    if plan.experts.sentence:
        found.append(plan.experts.sentence)
    return found


def _why(room: MemoryRoom) -> str:
    """Where the size of `room` comes from, in words."""
    if room.is_asked:
        return "as you set it"
    limit, total = installed_bytes(), psutil.virtual_memory().total
    if limit < total:
        return f"of the cgroup's limit of {human_bytes(limit)}"
    return f"of {human_bytes(total)}, what is free"

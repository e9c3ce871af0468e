"""Predicts a job after it has run, for its report, which has both."""

from collections.abc import Mapping
from typing import Any

from ...io.errors import PenstockError
from ...scheduler.cost.ranked_model import RankedModel
from ...scheduler.cost.shape import MicroBatchShape
from ...scheduler.cost.tensor_model import TensorModel
from ...scheduler.cost.workload import Generating, Prediction, Scoring, predict
from ...scheduler.cost.worth import cost_per_million, utilisation
from ..generation.prompt_chunk import prompt_chunk
from ..machines.machine import Machine
from ..policy import Policy
from ..tasks.task import Task
from ..units.arrangement import Arrangement
from .forecast import dtype_of, of_arrangement
from .ranked import RankedPlanner, alone
from .rates import peak_flops
from .tensor_ranked import TensorPlanner

_NO_ROWS = "no rows to predict for"


def predicted(
    task: Task,
    model: Any,
    arrangement: Arrangement,
    policy: Policy,
    machine: Machine,
    counts: Mapping[str, Any],
) -> dict[str, Any]:
    """The predicted seconds, tokens a second and what binds on `machine`, for a job of
    `task` with the tokens in `counts`; or `note`, which says why nothing is
    predicted."""
    try:
        made = of_arrangement(model, arrangement, policy, machine, task)
        work = work_of(task, policy, counts, in_parts=made.shape.prompts_in_parts)
        if work is None:
            return {"note": _NO_ROWS}
        found = predict(made.model, work)
        peak = peak_flops(machine, dtype_of(arrangement.recipes))
    except PenstockError as error:
        return {"note": f"nothing is predicted: {error}"}
    flops = made.shape.flops_per_token
    return {
        **_figures(task, found, machine, counts),
        **_worth(found, machine, counts, flops_per_token=flops, peak=peak),
    }


def predicted_of_ranks(
    task: Task,
    planner: RankedPlanner | TensorPlanner,
    policy: Policy,
    counts: Mapping[str, Any],
) -> dict[str, Any]:
    """As `predicted`, for a job of the ranks that `planner` plans for. `policy` is that
    of each rank, with the memory that it has."""
    own, machine = alone(policy), planner.whole.machine
    try:
        made = planner.forecast_for(own)
        work = work_of(task, own, counts, in_parts=made.shape.prompts_in_parts)
        if work is None:
            return {"note": _NO_ROWS}
        model: RankedModel | TensorModel = planner.model_of(own, made)
        found = predict(model, work)
        num = planner.group.num_nodes
        if machine.is_accelerated:
            num = planner.group.num
        peak = num * peak_flops(machine, dtype_of(planner.recipes))
    except PenstockError as error:
        return {"note": f"nothing is predicted: {error}"}
    flops, num_nodes = model.flops_per_token, planner.group.num_nodes
    return {
        **_figures(task, found, machine, counts),
        **_worth(
            found,
            machine,
            counts,
            flops_per_token=flops,
            peak=peak,
            num_nodes=num_nodes,
        ),
    }


def _figures(
    task: Task, found: Prediction, machine: Machine, counts: Mapping[str, Any]
) -> dict[str, Any]:
    tokens = counts["tokens"]
    result = {
        "predicted_seconds": found.seconds,
        "predicted_tokens_per_second": tokens / found.seconds,
        "predicted_bound_by": found.binds,
        "predicted_by": machine.source,
    }
    if task.keeps_kv:
        output = counts["output_tokens"]
        result["predicted_output_tokens_per_second"] = output / found.seconds
    return result


def _worth(
    found: Prediction,
    machine: Machine,
    counts: Mapping[str, Any],
    *,
    flops_per_token: float,
    peak: float,
    num_nodes: int = 1,
) -> dict[str, Any]:
    """The share of the peak FLOP/s that was used, and what a million tokens cost."""
    rate = counts["tokens_per_second"]
    seen = counts.get("output_tokens_per_second", rate)
    price = machine.price_per_hour
    return {
        "mfu": utilisation(rate, flops_per_token, peak),
        "predicted_mfu": utilisation(
            counts["tokens"] / found.seconds, flops_per_token, peak
        ),
        "cost_per_million_tokens": cost_per_million(
            None if price is None else price * num_nodes, seen
        ),
    }


def work_of(
    task: Task, policy: Policy, counts: Mapping[str, Any], *, in_parts: bool
) -> Scoring | Generating | None:
    """The job's work, of micro-batches as its mean ones were. None where it had
    none."""
    num = counts["micro_batches"]
    if not num:
        return None
    rows = max(num, counts["rows"])
    each = max(1, round(rows / num))
    if task.keeps_kv:
        prompt = counts["prompt_tokens"] + counts["tokens_padding"]
        num_sharing = min(num, max(1, policy.sequences_in_flight // each))
        return Generating(
            rows,
            max(1, round(prompt / rows)),
            max(1, round(counts["output_tokens"] / rows)),
            policy.sequences_in_flight,
            each,
            prompt_chunk(policy, each, num_sharing, in_parts=in_parts),
        )
    length = (counts["tokens"] + counts["tokens_padding"]) / (num * each)
    batches = (MicroBatchShape(each, max(1, round(length))),) * num
    return Scoring(
        batches, max(1, policy.tokens_in_flight // policy.micro_batch_tokens)
    )

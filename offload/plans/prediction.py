"""Predicts a job after it has run, for its report, which has both."""

from collections.abc import Mapping
from typing import Any

from ...io.errors import PenstockError
from ...scheduler.cost.shape import MicroBatchShape
from ...scheduler.cost.workload import Generating, Scoring, predict
from ..generation.prompt_chunk import prompt_chunk
from ..machines.machine import Machine
from ..policy import Policy
from ..tasks.task import Task
from ..units.arrangement import Arrangement
from .forecast import of_arrangement


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
            return {"note": "no rows to predict for"}
        found = predict(made.model, work)
    except PenstockError as error:
        return {"note": f"nothing is predicted: {error}"}
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

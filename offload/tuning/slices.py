"""Short slices of a job, and the speed of a policy on them."""

import gc
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from itertools import cycle, islice
from pathlib import Path
from typing import Any

from ...io.errors import InputError, PenstockError, UsageError
from ...scheduler.cost.workload import predict
from ..files.inputs import Inputs
from ..files.parts import Position
from ..files.sources import find_files
from ..machines.measure_calls import CountingTokenizer
from ..model import load, unwrap
from ..plans.forecast import generating_of, scoring_of
from ..plans.planned import Choice
from ..policy import Policy
from ..rows.row_error import RowError
from ..rows.text import load_tokenizer
from ..tasks.task import Task

_MOST_ROWS = 4096
_FIRST_NEW_TOKENS = 8
_NUM_IDS = 500


@dataclass(frozen=True, slots=True)
class Slice:
    """Some rows of a job, and the task to do with them."""

    task: Task
    rows: Sequence[Mapping[str, Any]]
    lengths: Sequence[int]
    """The number of tokens of each row."""
    is_made_up: bool
    """Whether the rows are made up: then a row's text is its number of tokens."""

    @property
    def num_tokens(self) -> int:
        """The tokens that its speed is told in: generated ones, or those of the
        rows."""
        if self.task.keeps_kv:
            return len(self.rows) * self.task.new_tokens
        return sum(self.lengths)


@dataclass(frozen=True, slots=True)
class RowSample:
    """The first rows of a job, or made-up rows."""

    rows: tuple[Mapping[str, Any], ...]
    lengths: tuple[int, ...]
    is_made_up: bool
    identity: Mapping[str, Any]
    """What identifies the rows, for the log of a search."""

    @property
    def mean_length(self) -> int:
        return max(1, round(sum(self.lengths) / len(self.lengths)))

    def cut(self, task: Task, in_flight: int, slices: int) -> Slice:
        """A slice of rows with `slices` times `in_flight` tokens. For a task that
        generates, `in_flight` rows, which get more tokens the larger `slices` is. Rows
        come again where there are too few."""
        rows = cycle(zip(self.rows, self.lengths, strict=True))
        if task.keeps_kv:
            found = list(islice(rows, in_flight))
        else:
            found = list(_up_to(rows, in_flight * slices))
        return Slice(
            task.shortened(_FIRST_NEW_TOKENS * slices),
            [row for row, _ in found],
            [length for _, length in found],
            self.is_made_up,
        )


def made_up(task: Task, num_tokens: int) -> RowSample:
    """Made-up rows of `num_tokens` each. Raises UsageError for a task that needs real
    rows."""
    row = task.made_up_row(num_tokens)
    if row is None:
        raise UsageError(
            f"rows for {task.name} cannot be made up: give a file of them as INPUT"
        )
    return RowSample((row,), (num_tokens,), True, {"tokens": num_tokens})


def sample_of(
    sources: Sequence[str | Path],
    model: Path,
    task: Task,
    *,
    trust_remote_code: bool = False,
) -> RowSample:
    """The first rows of `sources` that `task` can do. Raises InputError where there are
    none, and for standard input, which can be read only once."""
    inputs = Inputs(find_files(sources), task.row_keys)
    if inputs.is_stream:
        raise InputError(
            "standard input (-) cannot be measured again and again: give a file"
        )
    with closing(inputs.rows(Position())) as found:
        rows = [row.row for row in islice(found, _MOST_ROWS)]
    tokenizer = load_tokenizer(model, trust_remote_code=trust_remote_code)
    lengths = task.token_lengths(tokenizer, rows)
    good = [
        (row, num)
        for row, num in zip(rows, lengths, strict=True)
        if not isinstance(num, RowError)
    ]
    if not good:
        why = next((f"{num}" for num in lengths), "there is none")
        raise InputError(
            f"{', '.join(file.name for file in inputs.files)} has no row among its "
            f"first {_MOST_ROWS:,} that could be done, so nothing can be measured: "
            f"{why}"
        )
    return RowSample(
        tuple(row for row, _ in good),
        tuple(num for _, num in good),
        False,
        inputs.identity(),
    )


def _up_to(
    rows: Iterator[tuple[Mapping[str, Any], int]], tokens: int
) -> Iterator[tuple[Mapping[str, Any], int]]:
    for row, length in rows:
        yield row, length
        tokens -= length
        if tokens <= 0:
            return


def measured_rate(folder: Path, policy: Policy, work: Slice) -> float:
    """Measures tokens a second of `work` (generated ones, where there are any), after
    the model is loaded and one row has run. Raises UsageError where no row can be done,
    and what a job raises."""
    model = load(folder, policy)
    try:
        tokenizer: Any = None
        if work.is_made_up:
            config = model.config.get_text_config()
            tokenizer = CountingTokenizer(min(_NUM_IDS, config.vocab_size))
            if work.task.keeps_kv:
                model.generation_config.eos_token_id = None
        warm = replace(work, task=work.task.shortened(1), rows=work.rows[:1])
        _run(model, warm, tokenizer)
        start = time.perf_counter()
        tokens = _run(model, work, tokenizer)
        return tokens / (time.perf_counter() - start)
    finally:
        unwrap(model)
        del model
        gc.collect()  # before the next model is loaded


def _run(model: Any, work: Slice, tokenizer: Any) -> int:
    """Does the rows of `work`. Returns the tokens that its speed is told in."""
    progress = work.task.new_progress()
    _check(work.task.run(model, work.rows, tokenizer=tokenizer, progress=progress))
    return progress.tokens_counted


def _check(results: Iterable[Mapping[str, Any]]) -> None:
    done, error = 0, "there is none"
    for result in results:
        done += "error" not in result
        error = str(result.get("error", error))
    if not done:
        raise UsageError(f"no row could be done, so nothing is measured: {error}")


def predicted_rate(choice: Choice, work: Slice) -> float | None:
    """The tokens a second that the plan of `choice` predicts for `work`; None where it
    predicts nothing."""
    policy, costs = choice.policy, choice.forecast.model
    try:
        if work.task.keeps_kv:
            mean = max(1, round(sum(work.lengths) / len(work.lengths)))
            job = generating_of(
                policy,
                len(work.rows),
                mean,
                work.task.new_tokens,
                in_parts=choice.forecast.shape.prompts_in_parts,
            )
            found = predict(costs, job)
        else:
            found = predict(costs, scoring_of(policy, work.lengths))
    except PenstockError:
        return None
    return work.num_tokens / found.seconds if found.seconds else None

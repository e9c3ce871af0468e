"""Short slices of a job: the rows of one, and how fast a policy does them."""

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
from ..files.jsonl import PROMPT_KEYS, SCORED_KEYS
from ..files.parts import Position
from ..files.sources import find_files
from ..machines.measure_calls import CountingTokenizer
from ..model import load, unwrap
from ..plans.forecast import generating_of, scoring_of
from ..plans.planner import Choice, Task
from ..policy import Policy
from ..rows.text import RowError, load_tokenizer, tokenize_all, tokenize_prompt
from ..tasks.generate import generate
from ..tasks.score import score
from ..tasks.task_progress import GenerateProgress, ScoreProgress

_MOST_ROWS = 4096
_FIRST_NEW_TOKENS = 8
_NUM_IDS = 500


@dataclass(frozen=True, slots=True)
class Slice:
    """Rows to do, and what each gets."""

    rows: Sequence[Mapping[str, Any]]
    lengths: Sequence[int]
    """Tokens of each."""
    new_tokens: int
    """New tokens for each row that is completed; 0 where rows are scored."""
    is_made_up: bool
    """Whether a row's text is its number of tokens."""

    @property
    def generates(self) -> bool:
        return self.new_tokens > 0


@dataclass(frozen=True, slots=True)
class RowSample:
    """The first rows of a job, or rows like them."""

    rows: tuple[Mapping[str, Any], ...]
    lengths: tuple[int, ...]
    is_made_up: bool
    identity: Mapping[str, Any]
    """What tells them from others."""

    @property
    def mean_length(self) -> int:
        return max(1, round(sum(self.lengths) / len(self.lengths)))

    def cut(self, task: Task, in_flight: int, slices: int) -> Slice:
        """Scoring, `slices` times `in_flight` tokens; completing, `in_flight` rows that
        get more tokens the more slices it is. Rows come again where there are too
        few."""
        rows = cycle(zip(self.rows, self.lengths, strict=True))
        if task.generates:
            found = list(islice(rows, in_flight))
            new_tokens = min(task.new_tokens, _FIRST_NEW_TOKENS * slices)
        else:
            found = list(_up_to(rows, in_flight * slices))
            new_tokens = 0
        return Slice(
            [row for row, _ in found],
            [length for _, length in found],
            new_tokens,
            self.is_made_up,
        )


def made_up(num_tokens: int) -> RowSample:
    """Rows of so many tokens that mean nothing."""
    row = {"text": f"{num_tokens}"}
    return RowSample((row,), (num_tokens,), True, {"tokens": num_tokens})


def sample_of(
    sources: Sequence[str | Path],
    model: Path,
    *,
    generates: bool,
    trust_remote_code: bool = False,
) -> RowSample:
    """The first rows of some files. Raises InputError where there is none that can be
    done, and for standard input, whose rows come only once."""
    inputs = Inputs(find_files(sources), PROMPT_KEYS if generates else SCORED_KEYS)
    if inputs.is_stream:
        raise InputError(
            "standard input (-) cannot be measured again and again: give a file"
        )
    with closing(inputs.rows(Position())) as found:
        rows = [row.row for row in islice(found, _MOST_ROWS)]
    tokenizer = load_tokenizer(model, trust_remote_code=trust_remote_code)
    lengths = _lengths(tokenizer, rows, generates=generates)
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


def _lengths(
    tokenizer: Any, rows: Sequence[Mapping[str, Any]], *, generates: bool
) -> list[int | RowError]:
    """Tokens of each row, or why there are none."""
    if not generates:
        found = tokenize_all(tokenizer, rows)
        return [row if isinstance(row, RowError) else len(row.ids) for row in found]
    lengths: list[int | RowError] = []
    for row in rows:
        try:
            if "error" in row:
                raise RowError(row["error"])
            lengths.append(len(tokenize_prompt(tokenizer, row)))
        except RowError as error:
            lengths.append(error)
    return lengths


def _up_to(
    rows: Iterator[tuple[Mapping[str, Any], int]], tokens: int
) -> Iterator[tuple[Mapping[str, Any], int]]:
    for row, length in rows:
        yield row, length
        tokens -= length
        if tokens <= 0:
            return


def measured_rate(folder: Path, policy: Policy, work: Slice) -> float:
    """Tokens a second (new ones, where rows are completed) of `work`, once the model is
    loaded and one row has been through it. Raises UsageError where no row can be done,
    and what a job does."""
    model = load(folder, policy)
    try:
        tokenizer: Any = None
        if work.is_made_up:
            config = model.config.get_text_config()
            tokenizer = CountingTokenizer(min(_NUM_IDS, config.vocab_size))
            if work.generates:
                model.generation_config.eos_token_id = None
        warm = replace(work, rows=work.rows[:1], new_tokens=min(1, work.new_tokens))
        _run(model, warm, tokenizer)
        start = time.perf_counter()
        tokens = _run(model, work, tokenizer)
        return tokens / (time.perf_counter() - start)
    finally:
        unwrap(model)
        del model
        gc.collect()  # before the next one is loaded


def _run(model: Any, work: Slice, tokenizer: Any) -> int:
    """Does the rows. Returns the tokens that count."""
    if work.generates:
        generated = GenerateProgress()
        _check(
            generate(
                model,
                work.rows,
                max_new_tokens=work.new_tokens,
                tokenizer=tokenizer,
                progress=generated,
            )
        )
        return generated.output_tokens
    scored = ScoreProgress()
    _check(score(model, work.rows, tokenizer=tokenizer, progress=scored))
    return scored.tokens_done


def _check(results: Iterable[Mapping[str, Any]]) -> None:
    done, error = 0, "there is none"
    for result in results:
        done += "error" not in result
        error = str(result.get("error", error))
    if not done:
        raise UsageError(f"no row could be done, so nothing is measured: {error}")


def predicted_rate(choice: Choice, work: Slice) -> float | None:
    """What the plan of `choice` says of `work`; None where it says nothing."""
    policy, costs = choice.policy, choice.forecast.model
    try:
        if work.generates:
            mean = max(1, round(sum(work.lengths) / len(work.lengths)))
            num = len(work.rows)
            job = generating_of(
                policy,
                num,
                mean,
                work.new_tokens,
                in_parts=choice.forecast.shape.prompts_in_parts,
            )
            found = predict(costs, job)
            tokens = num * work.new_tokens
        else:
            found = predict(costs, scoring_of(policy, work.lengths))
            tokens = sum(work.lengths)
    except PenstockError:
        return None
    return tokens / found.seconds if found.seconds else None

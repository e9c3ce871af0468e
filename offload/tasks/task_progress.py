"""Counters of how far a task is."""

from collections.abc import Iterable
from dataclasses import dataclass, fields
from typing import Any, Protocol


class TaskProgress(Protocol):
    """Counters of a job's rows and tokens, updated as it goes."""

    rows_done: int
    rows_failed: int

    @property
    def tokens_counted(self) -> int:
        """The tokens of which speeds are told: generated ones, or those that ran."""
        ...

    def rows_through(self, pass_fraction: float) -> float: ...

    def tokens_through(self, pass_fraction: float) -> float: ...

    def figures(self, seconds: float) -> dict[str, Any]: ...


@dataclass(slots=True)
class ScoreProgress:
    """The counters of a task whose tokens run through the model once."""

    rows_done: int = 0
    rows_failed: int = 0
    rows_computed: float = 0.0
    """Rows whose pieces have run, in fractions. Rows before them may not be done."""
    rows_in_flight: float = 0.0
    tokens_in_flight: int = 0
    tokens_done: int = 0
    """Tokens that went through the model, without padding."""
    tokens_padding: int = 0
    micro_batches_done: int = 0

    @property
    def tokens_counted(self) -> int:
        return self.tokens_done

    def rows_through(self, pass_fraction: float) -> float:
        """Rows that are done, plus `pass_fraction` of those in flight."""
        computed = max(self.rows_done, self.rows_computed)
        return computed + self.rows_in_flight * pass_fraction

    def tokens_through(self, pass_fraction: float) -> float:
        """Tokens that are done, plus `pass_fraction` of those in flight."""
        return self.tokens_done + self.tokens_in_flight * pass_fraction

    def figures(self, seconds: float) -> dict[str, Any]:
        """What the report says of the job's tokens."""
        return {
            "tokens": self.tokens_done,
            "tokens_padding": self.tokens_padding,
            "micro_batches": self.micro_batches_done,
            "tokens_per_second": self.tokens_done / seconds,
        }


@dataclass(slots=True)
class GenerateProgress:
    """The counters of a task that generates tokens."""

    rows_done: int = 0
    rows_failed: int = 0
    rows_computed: int = 0
    """Rows that have run. Rows before them may not be done."""
    rows_in_flight: int = 0
    micro_batches_done: int = 0
    tokens_padding: int = 0
    prompt_tokens: int = 0
    output_tokens: int = 0
    max_new_tokens: int = 1

    @property
    def tokens_counted(self) -> int:
        return self.output_tokens

    def rows_through(self, pass_fraction: float) -> float:
        """Rows that are done, plus a fraction of those in flight, by the tokens that
        they have."""
        made = self.output_tokens / self.max_new_tokens
        computed = max(self.rows_done, self.rows_computed)
        return max(computed, min(made, computed + self.rows_in_flight))

    def tokens_through(self, pass_fraction: float) -> float:
        """The tokens that are generated. Each counts as soon as it is there."""
        return self.output_tokens

    def figures(self, seconds: float) -> dict[str, Any]:
        """What the report says of the job's tokens."""
        tokens = self.prompt_tokens + self.output_tokens
        return {
            "tokens": tokens,
            "prompt_tokens": self.prompt_tokens,
            "output_tokens": self.output_tokens,
            "tokens_padding": self.tokens_padding,
            "micro_batches": self.micro_batches_done,
            "tokens_per_second": tokens / seconds,
            "output_tokens_per_second": self.output_tokens / seconds,
        }


class RowsInFlight:
    """The rows of one micro-batch that count as in flight."""

    def __init__(self, progress: GenerateProgress, num: int) -> None:
        self._progress = progress
        self.num = num
        progress.rows_in_flight += num

    def leave(self, num: int) -> None:
        """Takes `num` rows out of those in flight."""
        self.num -= num
        self._progress.rows_in_flight -= num


def add_up(into: TaskProgress, parts: Iterable[TaskProgress]) -> None:
    """Sets the counters of `into` to the sums of those of `parts`, which come from the
    processes that share a job and are of the same class."""
    parts = list(parts)
    for name in (field.name for field in fields(into)):  # type: ignore[arg-type]
        counts = [getattr(part, name) for part in parts]
        is_limit = name == "max_new_tokens"
        if counts:
            setattr(into, name, max(counts) if is_limit else sum(counts))

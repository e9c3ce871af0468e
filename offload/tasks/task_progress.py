"""How far each task is, and how fast."""

from collections.abc import Iterable
from dataclasses import dataclass, fields
from typing import Any, Protocol


class TaskProgress(Protocol):
    """How far a job is, and at what speed."""

    rows_done: int
    rows_failed: int

    @property
    def tokens_counted(self) -> int:
        """The tokens that speeds are told in: those that came out, or went in."""
        ...

    def rows_through(self, pass_fraction: float) -> float: ...

    def tokens_through(self, pass_fraction: float) -> float: ...

    def figures(self, seconds: float) -> dict[str, Any]: ...


@dataclass(slots=True)
class ScoreProgress:
    """How far a scoring job is; updated as it goes."""

    rows_done: int = 0
    rows_failed: int = 0
    rows_computed: float = 0.0
    """With parts of those of which some pieces are; others before them may not be."""
    rows_in_flight: float = 0.0
    tokens_in_flight: int = 0
    tokens_done: int = 0
    """Tokens that went through the model, padding not counted."""
    tokens_padding: int = 0
    micro_batches_done: int = 0

    @property
    def tokens_counted(self) -> int:
        return self.tokens_done

    def rows_through(self, pass_fraction: float) -> float:
        """Rows done, and the parts of those under way."""
        computed = max(self.rows_done, self.rows_computed)
        return computed + self.rows_in_flight * pass_fraction

    def tokens_through(self, pass_fraction: float) -> float:
        """Tokens done, and the parts of those under way."""
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
    """How far a job is; updated as it goes."""

    rows_done: int = 0
    rows_failed: int = 0
    rows_computed: int = 0
    """Others before them may not be."""
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
        """Rows done, and the parts of those under way, at most their share."""
        made = self.output_tokens / self.max_new_tokens
        computed = max(self.rows_done, self.rows_computed)
        return max(computed, min(made, computed + self.rows_in_flight))

    def tokens_through(self, pass_fraction: float) -> float:
        """Output tokens; each counts when it is there, which is soon."""
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
    """The rows of one micro-batch that have a place."""

    def __init__(self, progress: GenerateProgress, num: int) -> None:
        self._progress = progress
        self.num = num
        progress.rows_in_flight += num

    def leave(self, num: int) -> None:
        """Others may come in their place."""
        self.num -= num
        self._progress.rows_in_flight -= num


def add_up(into: TaskProgress, parts: Iterable[TaskProgress]) -> None:
    """Sets the counters of `into` to the sums of those of `parts`, which are of its
    kind: processes that share a job."""
    parts = list(parts)
    for name in (field.name for field in fields(into)):  # type: ignore[arg-type]
        counts = [getattr(part, name) for part in parts]
        is_limit = name == "max_new_tokens"
        if counts:
            setattr(into, name, max(counts) if is_limit else sum(counts))

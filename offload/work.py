"""What a job does with the rows of a file: scores them, or completes them."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from .generate import GenerateProgress, generate
from .jsonl import PROMPT_KEYS, SCORED_KEYS
from .policy import Policy
from .score import ScoreProgress, score


class Progress(Protocol):
    """How far a job is, and at what speed."""

    rows_done: int
    rows_failed: int

    def rows_through(self, pass_fraction: float) -> float: ...

    def tokens_through(self, pass_fraction: float) -> float: ...

    def remark(self, seconds: float) -> str: ...

    def figures(self, seconds: float) -> dict[str, Any]: ...


class Work(Protocol):
    """What a job does with its rows."""

    @property
    def title(self) -> str: ...

    @property
    def progress(self) -> Progress: ...

    @property
    def row_keys(self) -> Mapping[str, str]: ...

    def results(
        self, model: Any, tokenizer: Any, rows: Iterator[dict[str, Any]]
    ) -> Iterator[dict[str, Any]]: ...

    def plan(self, policy: Policy, num_micro_batches: int) -> dict[str, int]: ...


@dataclass(frozen=True, slots=True)
class ScoreWork:
    """Scores each row."""

    window: int | None = None
    stride: int | None = None
    progress: ScoreProgress = field(default_factory=ScoreProgress)
    title: str = "scoring"
    row_keys: Mapping[str, str] = field(default_factory=lambda: SCORED_KEYS)

    def results(
        self, model: Any, tokenizer: Any, rows: Iterator[dict[str, Any]]
    ) -> Iterator[dict[str, Any]]:
        return score(
            model,
            rows,
            tokenizer=tokenizer,
            window=self.window,
            stride=self.stride,
            progress=self.progress,
        )

    def plan(self, policy: Policy, num_micro_batches: int) -> dict[str, int]:
        """What the policy promises: passes over the weights."""
        width = max(1, policy.tokens_in_flight // policy.micro_batch_tokens)
        return _plan(width, num_micro_batches, passes_each=1)


@dataclass(frozen=True, slots=True)
class GenerateWork:
    """Completes each row."""

    max_new_tokens: int
    stop: Sequence[str] = ()
    seed: int = 0
    options: Mapping[str, Any] = field(default_factory=dict)
    progress: GenerateProgress = field(default_factory=GenerateProgress)
    title: str = "generating"
    row_keys: Mapping[str, str] = field(default_factory=lambda: PROMPT_KEYS)

    def results(
        self, model: Any, tokenizer: Any, rows: Iterator[dict[str, Any]]
    ) -> Iterator[dict[str, Any]]:
        return generate(
            model,
            rows,
            max_new_tokens=self.max_new_tokens,
            tokenizer=tokenizer,
            stop=self.stop,
            seed=self.seed,
            progress=self.progress,
            **self.options,
        )

    def plan(self, policy: Policy, num_micro_batches: int) -> dict[str, int]:
        """What the policy promises, at most: passes over the weights."""
        each = min(policy.micro_batch_sequences, policy.sequences_in_flight)
        width = policy.sequences_in_flight // each
        return _plan(width, num_micro_batches, passes_each=self.max_new_tokens)


def _plan(width: int, num_micro_batches: int, *, passes_each: int) -> dict[str, int]:
    return {
        "micro_batches_in_flight": width,
        "passes": -(-num_micro_batches // width) * passes_each,
    }

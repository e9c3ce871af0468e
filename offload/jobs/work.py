"""What a job does with the rows of a file: scores, completes, embeds or classifies."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol

from ..files.jsonl import ASKED_KEYS, PROMPT_KEYS, SCORED_KEYS, TEXT_KEYS
from ..files.parts import Cut, NumberedRows
from ..plans.planned import Task
from ..policy import Policy
from ..settings.memory_budget import Use
from ..settings.values import Pooling
from ..tasks.classify import classify_parts
from ..tasks.embed import embed_parts
from ..tasks.generate import GenerateProgress, generate_parts, prompts_pooled
from ..tasks.packed import micro_batches_in_flight, tokens_pooled
from ..tasks.score import ScoreProgress, score_parts
from ..tasks.task_progress import TaskProgress

# A part is two pools of what is packed together: a few passes over the weights, which
# is what a job that is killed does again.
_POOLS = 2
_TOKEN_BYTES = 4
_MOST_ROWS = 4096
_MOST_BYTES = 64 << 20


class Work(Protocol):
    """What a job does with its rows."""

    @property
    def title(self) -> str: ...

    @property
    def use(self) -> Use:
        """What it loads the model for."""
        ...

    @property
    def progress(self) -> TaskProgress: ...

    @property
    def row_keys(self) -> Mapping[str, str]: ...

    def task(self) -> Mapping[str, Any]:
        """The task and its options, as JSON has them: what decides on results."""
        ...

    def cut(self, policy: Policy) -> Cut:
        """How rows are best cut into parts. Those of two parts are never packed
        together, so what is computed for a part does not depend on the others."""
        ...

    def results(
        self, model: Any, tokenizer: Any, parts: Iterator[NumberedRows]
    ) -> Iterator[dict[str, Any]]:
        """A result for each row, in their order."""
        ...

    def planned(self, length: int) -> Task:
        """As the planner has it, for rows (or prompts) of about `length` tokens."""
        ...

    def plan(self, policy: Policy, num_micro_batches: int) -> dict[str, int]: ...


class _OverTokens:
    """Work of which the tokens in flight share a pass, and are done after it."""

    __slots__ = ()
    use: ClassVar[Use] = "rows"
    _passes_each: ClassVar[int] = 1
    _embeds: ClassVar[bool] = False

    def planned(self, length: int) -> Task:
        return Task(prompt_tokens=length, embeds=self._embeds)

    def cut(self, policy: Policy) -> Cut:
        """Two pools, about, by the bytes that tokens come to."""
        num_bytes = _POOLS * _TOKEN_BYTES * tokens_pooled(policy)
        return Cut(_MOST_ROWS, min(num_bytes, _MOST_BYTES))

    def plan(self, policy: Policy, num_micro_batches: int) -> dict[str, int]:
        """What the policy promises, at most: passes over the weights."""
        width = micro_batches_in_flight(policy)
        return _plan(width, num_micro_batches, passes_each=self._passes_each)


@dataclass(frozen=True, slots=True)
class ScoreWork(_OverTokens):
    """Scores each row."""

    window: int | None = None
    stride: int | None = None
    progress: ScoreProgress = field(default_factory=ScoreProgress)
    title: str = "scoring"
    row_keys: Mapping[str, str] = field(default_factory=lambda: SCORED_KEYS)

    def task(self) -> Mapping[str, Any]:
        return {"task": "score", "window": self.window, "stride": self.stride}

    def results(
        self, model: Any, tokenizer: Any, parts: Iterator[NumberedRows]
    ) -> Iterator[dict[str, Any]]:
        return score_parts(
            model,
            parts,
            tokenizer=tokenizer,
            window=self.window,
            stride=self.stride,
            progress=self.progress,
        )


@dataclass(frozen=True, slots=True)
class EmbedWork(_OverTokens):
    """Makes a vector of each row."""

    _embeds: ClassVar[bool] = True
    pooling: Pooling = "auto"
    normalize: bool | None = None
    truncate: int | None = None
    progress: ScoreProgress = field(default_factory=ScoreProgress)
    title: str = "embedding"
    row_keys: Mapping[str, str] = field(default_factory=lambda: TEXT_KEYS)

    def task(self) -> Mapping[str, Any]:
        return {
            "task": "embed",
            "pooling": self.pooling,
            "normalize": self.normalize,
            "truncate": self.truncate,
        }

    def results(
        self, model: Any, tokenizer: Any, parts: Iterator[NumberedRows]
    ) -> Iterator[dict[str, Any]]:
        return embed_parts(
            model,
            parts,
            tokenizer=tokenizer,
            pooling=self.pooling,
            normalize=self.normalize,
            truncate=self.truncate,
            progress=self.progress,
        )


@dataclass(frozen=True, slots=True)
class ClassifyWork(_OverTokens):
    """Tells rows apart: prompts in a pass, labels in another one."""

    _passes_each: ClassVar[int] = 2
    labels: Sequence[str] = ()
    progress: ScoreProgress = field(default_factory=ScoreProgress)
    title: str = "classifying"
    row_keys: Mapping[str, str] = field(default_factory=lambda: ASKED_KEYS)

    def task(self) -> Mapping[str, Any]:
        return {"task": "classify", "labels": list(self.labels)}

    def results(
        self, model: Any, tokenizer: Any, parts: Iterator[NumberedRows]
    ) -> Iterator[dict[str, Any]]:
        return classify_parts(
            model,
            parts,
            labels=self.labels,
            tokenizer=tokenizer,
            progress=self.progress,
        )


@dataclass(frozen=True, slots=True)
class GenerateWork:
    """Completes each row."""

    use: ClassVar[Use] = "completions"
    max_new_tokens: int
    stop: Sequence[str] = ()
    seed: int = 0
    options: Mapping[str, Any] = field(default_factory=dict)
    progress: GenerateProgress = field(default_factory=GenerateProgress)
    title: str = "generating"
    row_keys: Mapping[str, str] = field(default_factory=lambda: PROMPT_KEYS)

    def task(self) -> Mapping[str, Any]:
        return {
            "task": "generate",
            "max_new_tokens": self.max_new_tokens,
            "stop": list(self.stop),
            "seed": self.seed,
            "options": dict(self.options),
        }

    def planned(self, length: int) -> Task:
        return Task(True, length, self.max_new_tokens)

    def cut(self, policy: Policy) -> Cut:
        """One pool: as many rows as are in flight."""
        return Cut(prompts_pooled(policy), _MOST_BYTES)

    def results(
        self, model: Any, tokenizer: Any, parts: Iterator[NumberedRows]
    ) -> Iterator[dict[str, Any]]:
        return generate_parts(
            model,
            parts,
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

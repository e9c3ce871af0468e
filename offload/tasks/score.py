"""Scores rows of text by their log-probability under a model. Many rows share one pass
over the streamed weights."""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from ...io.devices.host_copy import Finding, HostCopy
from ...io.devices.queued_copy import queued_to
from ...io.errors import UsageError
from ..model import engine_of
from ..rows.limits import limits_of
from ..rows.row_error import RowError
from ..rows.text import TokenRow, tokenize_all
from .head import CausalScorer, padding_mask
from .packed import Row, RowPiece
from .score_task import Score
from .task_progress import ScoreProgress


@dataclass(slots=True)
class ScoredRow(Row):
    """A row to score."""

    num_tokens: int = 0
    logprobs: dict[int, float] = field(default_factory=dict)
    """The log-probability of each window, by where it starts."""
    details: dict[int, Any] = field(default_factory=dict)
    """What a runner that is built on this one keeps of each window."""


@dataclass(frozen=True, slots=True)
class TextWindow(RowPiece[ScoredRow]):
    """The part of a row that goes through the model in one call."""

    scored: int
    """Index in `ids` of the first token to score."""
    start: int
    """Where this window starts in its row. Windows are added up in this order."""

    @property
    def places(self) -> slice:
        """Where the scored tokens are among all tokens but the first."""
        return slice(self.scored - 1, len(self.ids) - 1)


def score(
    model: Any,
    rows: Iterable[Mapping[str, Any]],
    *,
    tokenizer: Any = None,
    window: int | None = None,
    stride: int | None = None,
    progress: ScoreProgress | None = None,
) -> Iterator[dict[str, Any]]:
    """Yields a result for every row, in order, for a `model` from `penstock.load`.

    A row is `{"id", "text"}` or `{"id", "prompt", "completion"}`; a result is `{"id",
    "logprob", "tokens", "perplexity"}` (nats; of the completion, or of the whole text
    after its first token), or `{"id", "error"}` for a row that cannot be scored.

    `rows` may be lazy and longer than memory. `window` scores texts longer than the
    model's context in windows of that many tokens that advance by `stride` (default:
    half a window); without it such a row is an error.
    """
    task = Score(window, stride)
    return task.run(model, rows, tokenizer=tokenizer, progress=progress)


class ScoreRunner:
    """Runs rows through a causal language model and reads the log-probabilities of
    their tokens. Raises UsageError where `task` does not fit the model."""

    def __init__(self, task: Score, model: Any, tokenizer: Any) -> None:
        engine = engine_of(model)
        policy = engine.policy
        self._device = engine.device
        self._tokenizer = tokenizer
        self._scorer = CausalScorer(model, max_logits_bytes=policy.logits_memory)
        if not self._scorer.is_chunked:
            engine.fallbacks.announce(
                f"{type(model).__name__} gives its logits only as a whole: up to "
                f"{policy.micro_batch_tokens} tokens' at a time are in memory"
            )
        self._limits = limits_of(model)
        self.pad = self._limits.pad_of(tokenizer.pad_token_id)
        self._context = self._limits.context
        self._window, self._stride = _window(task.window, task.stride, self._context)

    def cut(
        self, rows: Sequence[Mapping[str, Any]]
    ) -> Iterator[tuple[ScoredRow, Sequence[TextWindow] | RowError]]:
        found = tokenize_all(self._tokenizer, rows)
        for source, tokens in zip(rows, found, strict=True):
            row = ScoredRow(source.get("id"))
            if isinstance(tokens, RowError):
                yield row, tokens
                continue
            row.num_tokens = len(tokens.ids) - tokens.first
            try:
                self._limits.check_ids(tokens.ids)
                yield row, self._windows(row, tokens)
            except RowError as error:
                yield row, error

    def _windows(self, row: ScoredRow, tokens: TokenRow) -> list[TextWindow]:
        length = len(tokens.ids)
        if self._window is None:
            if self._context is not None and length > self._context:
                raise RowError(
                    f"the text has {length} tokens but the model's context is "
                    f"{self._context}: score it in windows (--window {self._context})"
                )
            return [TextWindow(row, tokens.ids, tokens.first, 0)]
        cuts = spans(length, tokens.first, window=self._window, stride=self._stride)
        return [
            TextWindow(row, tokens.ids[start:end], scored - start, start)
            for start, end, scored in cuts
        ]

    def run(
        self, pieces: Sequence[TextWindow], ids: torch.Tensor, mask: torch.Tensor
    ) -> Finding:
        found = self._scorer.log_probabilities(
            queued_to(ids, self._device), padding_mask(mask, self._device)
        )

        def note(found: torch.Tensor) -> None:
            for window, logprobs in zip(pieces, found, strict=True):
                part = logprobs[window.places]
                window.row.logprobs[window.start] = float(part.double().sum())

        return Finding([HostCopy(found)], note)

    def result(self, row: ScoredRow) -> dict[str, Any]:
        """The result of a row. Windows are added up by where they start, so that the
        sum does not depend on which was finished first."""
        total = math.fsum(row.logprobs[start] for start in sorted(row.logprobs))
        if not math.isfinite(total):
            row.error = (
                f"the model gave a log-probability of {total}: its weights or its "
                "dtype overflow on this text"
            )
            return {}
        return {
            "id": row.identity,
            "logprob": total,
            "tokens": row.num_tokens,
            "perplexity": math.exp(min(-total / row.num_tokens, 709.0)),
        }


def _window(
    window: int | None, stride: int | None, context: int | None
) -> tuple[int | None, int]:
    if window is None:
        if stride is not None:
            raise UsageError("a stride needs a window")
        return None, 0
    limit = context if context is not None else window
    if not 2 <= window <= limit:
        raise UsageError(
            f"a window of {window} tokens is not between 2 and the context of {limit}"
        )
    stride = max(1, window // 2) if stride is None else stride
    if not 0 < stride < window:
        raise UsageError(f"a stride of {stride} is not between 1 and {window - 1}")
    return window, stride


def spans(
    length: int, first: int, *, window: int, stride: int
) -> list[tuple[int, int, int]]:
    """Cuts a row of `length` tokens into windows of at most `window`.

    Returns (start, end, scored): tokens `start` to `end` are run, those from `scored`
    on (absolute) are scored in this window. Every token from `first` (at least 1: the
    first has no past) is scored exactly once, with at least `window - stride` tokens
    of context where the row has them.
    """
    if not 0 < stride < window:
        raise ValueError(f"a stride of {stride} must be between 1 and {window - 1}")
    windows = []
    scored = max(first, 1)
    end = min(length, window)
    while True:
        if end > scored:
            windows.append((max(0, end - window), end, scored))
            scored = end
        if end >= length:
            return windows
        end = min(length, end + stride)

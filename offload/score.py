"""Scores rows of text: how likely is each under the model? Many rows share one pass
over the streamed weights."""

import math
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import torch

from ..io.errors import PenstockError, UsageError
from ..scheduler.packing import pack, spans
from .head import CausalScorer
from .model import engine_of
from .parts import NumberedRows, lazy_parts
from .policy import Policy
from .task_progress import ScoreProgress as ScoreProgress
from .text import RowError, TokenRow, context_length, load_tokenizer, tokenize_all

# Rows that are packed together: so many micro-batches, so that lengths match well.
_POOL_MICRO_BATCHES = 16
# Rows that are given to the tokenizer in one call.
_TOKENIZED_ROWS = 16
# Of those that nobody has cut into parts; failed ones wait for the end of theirs.
_LAZY_ROWS = 4096


@dataclass(slots=True)
class _Row:
    """A row on its way: its windows come back one by one, in any order."""

    identity: Any
    windows_left: int = 0
    num_tokens: int = 0
    logprobs: dict[int, float] = field(default_factory=dict)
    error: str | None = None

    @property
    def is_done(self) -> bool:
        return self.error is not None or self.windows_left == 0

    def result(self) -> dict[str, Any]:
        """What is written for the row. Windows are added up in their order, so that
        the sum does not depend on which was finished first."""
        total = math.fsum(self.logprobs[start] for start in sorted(self.logprobs))
        if self.error is None and not math.isfinite(total):
            self.error = (
                f"the model gave a log-probability of {total}: its weights or its "
                "dtype overflow on this text"
            )
        if self.error is not None:
            return {"id": self.identity, "error": self.error}
        return {
            "id": self.identity,
            "logprob": total,
            "tokens": self.num_tokens,
            "perplexity": math.exp(min(-total / self.num_tokens, 709.0)),
        }


@dataclass(frozen=True, slots=True)
class _Window:
    row: _Row
    ids: tuple[int, ...]
    scored: int
    """Index in `ids` of the first token to score."""
    start: int
    """Of this window in its row; orders the row's sums."""


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
    return score_parts(
        model,
        lazy_parts(rows, _LAZY_ROWS),
        tokenizer=tokenizer,
        window=window,
        stride=stride,
        progress=progress or ScoreProgress(),
    )


def score_parts(
    model: Any,
    parts: Iterator[NumberedRows],
    *,
    tokenizer: Any,
    window: int | None,
    stride: int | None,
    progress: ScoreProgress,
) -> Iterator[dict[str, Any]]:
    """Like `score`, of rows in parts: no two parts share a micro-batch, so that the
    results of each are, bit for bit, the same without the others."""
    return _Scoring(model, tokenizer, window, stride, progress).run(parts)


def tokens_pooled(policy: Policy) -> int:
    """Tokens of the rows that are packed together: of many micro-batches, so that
    lengths match well."""
    width = micro_batches_in_flight(policy)
    return policy.micro_batch_tokens * max(_POOL_MICRO_BATCHES, 2 * width)


def micro_batches_in_flight(policy: Policy) -> int:
    return max(1, policy.tokens_in_flight // policy.micro_batch_tokens)


class _Scoring:
    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        window: int | None,
        stride: int | None,
        progress: ScoreProgress,
    ) -> None:
        self._engine = engine_of(model)
        policy = self._engine.policy
        self._device = torch.device(policy.device)
        self._tokenizer = tokenizer or load_tokenizer(model.config.name_or_path)
        self._scorer = CausalScorer(model, max_logits_bytes=policy.logits_memory)
        if not self._scorer.is_chunked:
            self._engine.note(
                f"{type(model).__name__} gives its logits only as a whole: up to "
                f"{policy.micro_batch_tokens} tokens' at a time are in memory"
            )
        self._context = context_length(model)
        self._window, self._stride = _window(window, stride, self._context)
        self._max_tokens = policy.micro_batch_tokens
        self._width = micro_batches_in_flight(policy)
        self._pool_tokens = tokens_pooled(policy)
        self._progress = progress
        pad = self._tokenizer.pad_token_id
        self._pad = 0 if pad is None else pad
        self._pending: deque[_Row] = deque()

    def run(self, parts: Iterator[NumberedRows]) -> Iterator[dict[str, Any]]:
        """Results in the order of rows: a row waits for those before it."""
        sweep = self._engine.sweep(self._width, seed=0)
        with sweep:
            for outcome in sweep.run(self._score, self._micro_batches(parts)):
                if outcome.error is not None:
                    raise outcome.error  # ours: a row's own is in its result
                yield from self._finished()
        yield from self._finished()

    def _finished(self) -> Iterator[dict[str, Any]]:
        while self._pending and self._pending[0].is_done:
            result = self._pending.popleft().result()
            self._progress.rows_done += 1
            self._progress.rows_failed += "error" in result
            yield result

    def _micro_batches(self, parts: Iterator[NumberedRows]) -> Iterator[list[_Window]]:
        """Takes rows as they are needed and groups windows of similar lengths."""
        for part in parts:
            rows = (row for _, row in part)
            while pool := self._pool(rows):
                lengths = [len(window.ids) for window in pool]
                for group in pack(lengths, max_tokens=self._max_tokens):
                    yield [pool[index] for index in group]
            if self._pending and self._pending[-1].is_done:
                yield []  # for its failed rows to be handed on now

    def _pool(self, rows: Iterator[Mapping[str, Any]]) -> list[_Window]:
        pool: list[_Window] = []
        tokens = 0
        while tokens < self._pool_tokens:
            batch = list(islice(rows, _TOKENIZED_ROWS))
            if not batch:
                break
            for window in self._windows(batch):
                pool.append(window)
                tokens += len(window.ids)
        return pool

    def _windows(self, batch: Sequence[Mapping[str, Any]]) -> Iterator[_Window]:
        for source, tokens in zip(
            batch, tokenize_all(self._tokenizer, batch), strict=True
        ):
            row = _Row(source.get("id"))
            self._pending.append(row)
            try:
                if isinstance(tokens, RowError):
                    raise tokens
                windows = self._cut(row, tokens)
            except RowError as error:
                row.error = str(error)
                continue
            row.windows_left = len(windows)
            row.num_tokens = len(tokens.ids) - tokens.first
            self._progress.rows_in_flight += 1
            yield from windows

    def _cut(self, row: _Row, tokens: TokenRow) -> list[_Window]:
        length = len(tokens.ids)
        if self._window is None:
            if self._context is not None and length > self._context:
                raise RowError(
                    f"the text has {length} tokens but the model's context is "
                    f"{self._context}: score it in windows (--window {self._context})"
                )
            return [_Window(row, tokens.ids, tokens.first, 0)]
        cuts = spans(length, tokens.first, window=self._window, stride=self._stride)
        return [
            _Window(row, tokens.ids[start:end], scored - start, start)
            for start, end, scored in cuts
        ]

    def _score(self, windows: list[_Window]) -> None:
        """Runs as one micro-batch of the sweep. What the model makes of these rows is
        their error; what Penstock fails at is the job's."""
        if not windows:
            return
        self._progress.micro_batches_done += 1
        try:
            self._run_model(windows)
        except PenstockError:
            raise
        except Exception as error:
            for window in windows:
                window.row.error = f"the model failed: {type(error).__name__}: {error}"

    def _run_model(self, windows: list[_Window]) -> None:
        longest = max(len(window.ids) for window in windows)
        ids = torch.full((len(windows), longest), self._pad, dtype=torch.int64)
        mask = torch.zeros_like(ids)
        for index, window in enumerate(windows):
            ids[index, : len(window.ids)] = torch.tensor(window.ids)
            mask[index, : len(window.ids)] = 1
        padding = int(mask.numel() - mask.sum())
        found = self._scorer.log_probabilities(
            ids.to(self._device), mask.to(self._device) if padding else None
        ).cpu()
        for window, logprobs in zip(windows, found, strict=True):
            part = logprobs[window.scored - 1 : len(window.ids) - 1]
            window.row.logprobs[window.start] = float(part.double().sum())
            window.row.windows_left -= 1
            self._progress.rows_in_flight -= window.row.windows_left == 0
        self._progress.tokens_done += int(mask.sum())
        self._progress.tokens_padding += padding


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

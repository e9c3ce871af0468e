"""Classifies rows of text by how likely each of some labels is to come next."""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from ...io.devices.host_copy import Finding, HostCopy
from ...io.devices.known import known_to
from ...io.devices.queued_copy import queued_to
from ...io.errors import UsageError
from ..model import engine_of
from ..rows.labels import Label, Labelled, tokenize_labels
from ..rows.limits import limits_of
from ..rows.row_error import RowError
from .classify_task import Classify
from .head import CausalScorer
from .packed import Row, RowPiece
from .shared_prompt import SharedPrompts, can_share
from .task_progress import ScoreProgress


@dataclass(slots=True)
class _Row(Row):
    labels: tuple[Label, ...] = ()
    num_tokens: int = 0
    logprobs: dict[int, float] = field(default_factory=dict)
    """The log-probability of each label, by its number among the row's labels."""


@dataclass(frozen=True, slots=True)
class _Prompt(RowPiece[_Row]):
    """A prompt and the labels that may follow it. Where a model cannot share the
    prompt's computation, there is one for each label."""

    labels: tuple[tuple[int, Label], ...]

    @property
    def num_tokens(self) -> int:
        return len(self.ids) + sum(len(label.ids) for _, label in self.labels)


def classify(
    model: Any,
    rows: Iterable[Mapping[str, Any]],
    *,
    labels: Sequence[str] = (),
    tokenizer: Any = None,
    progress: ScoreProgress | None = None,
) -> Iterator[dict[str, Any]]:
    """Yields the likeliest label of every row, in order, for a causal language `model`
    from `penstock.load`.

    A row is `{"id", "prompt"}` (or `"text"`), with `"labels"` of its own or those
    given here; a result is `{"id", "label", "logprobs", "probabilities", "tokens"}`:
    the log-probability (nats) of each label as what comes next, its share among the
    labels, and how many tokens were run; or `{"id", "error"}`. Labels are taken as they
    are: begin them with a space where the text goes on with one.

    A prompt is run once for all of its labels, with one more pass over the weights
    where labels have several tokens.
    """
    task = Classify.of(labels=labels)
    return task.run(model, rows, tokenizer=tokenizer, progress=progress)


class ClassifyRunner:
    """Runs prompts through a causal language model and reads the log-probabilities of
    the labels that may follow. Raises UsageError where `task` does not fit the
    model."""

    def __init__(self, task: Classify, model: Any, tokenizer: Any) -> None:
        labels = task.labels
        if len(set(labels)) < len(labels):
            raise UsageError(f"a label is given twice: {', '.join(labels)}")
        engine = engine_of(model)
        self._model = model
        self._device = engine.device
        self._tokenizer = tokenizer
        self._limits = limits_of(model)
        self.pad = self._limits.pad_of(tokenizer.pad_token_id)
        self._labels = labels
        self._scorer = CausalScorer(model, max_logits_bytes=engine.policy.logits_memory)
        self._shares = can_share(model)
        if not self._shares:
            engine.fallbacks.announce(
                f"{type(model).__name__} keeps more than keys and values: its prompts "
                "are run again for each label"
            )

    def cut(
        self, rows: Sequence[Mapping[str, Any]]
    ) -> Iterator[tuple[_Row, Sequence[_Prompt] | RowError]]:
        for source in rows:
            row = _Row(source.get("id"))
            try:
                found = tokenize_labels(self._tokenizer, source, self._labels)
                self._check(found)
            except RowError as error:
                yield row, error
                continue
            row.labels = found.labels
            row.num_tokens = len(found.prompt) + sum(len(x.ids) for x in found.labels)
            numbered = tuple(enumerate(found.labels))
            if self._shares:
                yield row, [_Prompt(row, found.prompt, numbered)]
            else:
                yield row, [_Prompt(row, found.prompt, (pair,)) for pair in numbered]

    def _check(self, found: Labelled) -> None:
        self._limits.check_ids(found.prompt)
        for label in found.labels:
            self._limits.check_ids(label.ids)
        length = len(found.prompt) + max(len(label.ids) for label in found.labels)
        if self._limits.context is not None and length > self._limits.context:
            raise RowError(
                f"the prompt with its longest label has {length} tokens but the "
                f"model's context is {self._limits.context}: shorten it"
            )

    def run(
        self, pieces: Sequence[_Prompt], ids: torch.Tensor, mask: torch.Tensor
    ) -> Finding:
        if self._shares:
            return self._run_shared(pieces)
        whole = [piece.ids + piece.labels[0][1].ids for piece in pieces]
        found = self._scorer.log_probabilities(*self._padded(whole, left=False))

        def note(found: torch.Tensor) -> None:
            for piece, logprobs in zip(pieces, found, strict=True):
                ((number, label),) = piece.labels
                start = len(piece.ids) + label.first
                part = logprobs[start - 1 : len(piece.ids) + len(label.ids) - 1]
                piece.row.logprobs[number] = float(part.double().sum())

        return Finding([HostCopy(found)], note)

    def _run_shared(self, pieces: Sequence[_Prompt]) -> Finding:
        prompts = self._padded([piece.ids for piece in pieces], left=True)
        shared = SharedPrompts(self._model, self._scorer, *prompts)
        copies = [HostCopy(shared.logits.log_softmax(-1))]
        longer = [
            (index, number, label)
            for index, piece in enumerate(pieces)
            for number, label in piece.labels
            if len(label.ids) > 1
        ]
        if longer:
            tails = self._padded([label.ids for _, _, label in longer], left=False)
            continued = [index for index, _, _ in longer]
            copies.append(HostCopy(shared.log_probabilities(*tails, continued)))

        def note(first: torch.Tensor, *others: torch.Tensor) -> None:
            for index, piece in enumerate(pieces):
                for number, label in piece.labels:
                    is_counted = label.first == 0
                    value = float(first[index, label.ids[0]]) if is_counted else 0.0
                    piece.row.logprobs[number] = value
            for found in others:
                for (index, number, label), each in zip(longer, found, strict=True):
                    part = each[max(label.first - 1, 0) : len(label.ids) - 1]
                    pieces[index].row.logprobs[number] += float(part.double().sum())

        return Finding(copies, note)

    def _padded(
        self, rows: Sequence[tuple[int, ...]], *, left: bool
    ) -> tuple[torch.Tensor, torch.Tensor]:
        longest = max(map(len, rows))
        ids = torch.full((len(rows), longest), self.pad, dtype=torch.int64)
        mask = torch.zeros_like(ids)
        for index, row in enumerate(rows):
            start = longest - len(row) if left else 0
            ids[index, start : start + len(row)] = torch.tensor(row)
            mask[index, start : start + len(row)] = 1
        return queued_to(ids, self._device), known_to(mask, self._device)

    def result(self, row: _Row) -> dict[str, Any]:
        logprobs = [row.logprobs[number] for number in range(len(row.labels))]
        most = max(logprobs)
        if not all(map(math.isfinite, logprobs)):
            row.error = (
                f"the model gave log-probabilities of {logprobs}: its weights or its "
                "dtype overflow on this text"
            )
            return {}
        shares = [math.exp(value - most) for value in logprobs]
        names = [label.text for label in row.labels]
        return {
            "id": row.identity,
            "label": names[logprobs.index(most)],
            "logprobs": dict(zip(names, logprobs, strict=True)),
            "probabilities": {
                name: share / math.fsum(shares)
                for name, share in zip(names, shares, strict=True)
            },
            "tokens": row.num_tokens,
        }

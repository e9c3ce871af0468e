"""Embeds rows of text: a vector for each, by an encoder or a decoder."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import numpy
import torch

from ...io.devices.host_copy import Finding, HostCopy
from ...io.devices.known import known_to
from ...io.devices.queued_copy import queued_to
from ...io.errors import UsageError
from ..model import engine_of
from ..rows.limits import limits_of
from ..rows.row_error import RowError
from ..rows.text import tokenize_texts
from ..settings.values import Pooling
from ..traces.model_kind import base_of
from .embed_task import Embed
from .packed import Row, RowPiece
from .pooling import pooled
from .task_progress import ScoreProgress


@dataclass(slots=True)
class _Row(Row):
    num_tokens: int = 0
    vector: torch.Tensor = field(default_factory=lambda: torch.empty(0))


def embed(
    model: Any,
    rows: Iterable[Mapping[str, Any]],
    *,
    tokenizer: Any = None,
    pooling: Pooling = "auto",
    normalize: bool | None = None,
    truncate: int | None = None,
    progress: ScoreProgress | None = None,
) -> Iterator[dict[str, Any]]:
    """Yields a vector for every row, in order, for a `model` from `penstock.load`.

    A row is `{"id", "text"}`; a result is `{"id", "embedding", "tokens"}` (a list of
    float32 numbers), or `{"id", "error"}`. `pooling` makes one vector of those of a
    text's tokens, after the model's last block: their `mean`, the first (`cls`), the
    `last`, or the `max` of each number. `auto`, and None for `normalize` (to length 1),
    are as the checkpoint's sentence-transformers files say, else `mean` for an encoder
    and `last` for a decoder. A text that is longer than the model's context is an
    error, or cut to its first `truncate` tokens.

    `rows` may be lazy and longer than memory. Raises UsageError for options that do not
    fit the model.
    """
    task = Embed(pooling, normalize, truncate)
    return task.run(model, rows, tokenizer=tokenizer, progress=progress)


class EmbedRunner:
    """Runs rows through a model without its head and makes a vector of each one's
    hidden states. Raises UsageError where `task` does not fit the model."""

    def __init__(self, task: Embed, model: Any, tokenizer: Any) -> None:
        engine = engine_of(model)
        self._device, self._exchange = engine.device, engine.exchange
        self._tokenizer = tokenizer
        self._base = base_of(model)
        self._pool = pooled(model, task.pooling, task.normalize)
        self._limits = limits_of(model)
        self.pad = self._limits.pad_of(tokenizer.pad_token_id)
        context = self._limits.context
        self._most = context
        truncate = task.truncate
        if truncate is not None:
            if truncate < 1 or truncate > (context or truncate):
                raise UsageError(
                    f"texts cannot be cut to {truncate} tokens: 1 to {context}"
                )
            self._most = truncate
        self._cuts = truncate is not None

    def cut(
        self, rows: Sequence[Mapping[str, Any]]
    ) -> Iterator[tuple[_Row, Sequence[RowPiece[_Row]] | RowError]]:
        found = tokenize_texts(self._tokenizer, rows)
        for source, ids in zip(rows, found, strict=True):
            row = _Row(source.get("id"))
            if isinstance(ids, RowError):
                yield row, ids
                continue
            if self._cuts:
                ids = ids[: self._most]
            try:
                self._check(ids)
            except RowError as error:
                yield row, error
                continue
            row.num_tokens = len(ids)
            yield row, [RowPiece(row, ids)]

    def _check(self, ids: Sequence[int]) -> None:
        self._limits.check_ids(ids)
        if self._most is not None and len(ids) > self._most:
            raise RowError(
                f"the text has {len(ids)} tokens but the model's context is "
                f"{self._most}: cut it (--truncate {self._most})"
            )

    def run(
        self, pieces: Sequence[RowPiece[_Row]], ids: torch.Tensor, mask: torch.Tensor
    ) -> Finding:
        mask = known_to(mask, self._device)
        inputs = {"input_ids": queued_to(ids, self._device), "attention_mask": mask}
        exchange = self._exchange
        with nullcontext() if exchange is None else exchange.kept_back.staying():
            hidden = self._base(**inputs).last_hidden_state
        if exchange is None:
            found = self._pool(hidden, mask)
        else:
            found = exchange.on_head(lambda: self._pool(hidden, mask))

        def note(vectors: torch.Tensor) -> None:
            for piece, vector in zip(pieces, vectors, strict=True):
                piece.row.vector = vector

        return Finding([HostCopy(found)], note)

    def result(self, row: _Row) -> dict[str, Any]:
        if not row.vector.isfinite().all():
            row.error = (
                "the model gave a vector that is not finite: its weights or its dtype "
                "overflow on this text"
            )
            return {}
        return {
            "id": row.identity,
            "embedding": _numbers(row.vector),
            "tokens": row.num_tokens,
        }


def _numbers(vector: torch.Tensor) -> list[float]:
    """The numbers of `vector`, each with as few digits as tell it from other float32
    ones."""
    return [float(str(value)) for value in vector.numpy().astype(numpy.float32)]

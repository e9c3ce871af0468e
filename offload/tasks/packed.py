"""Runs rows through a sweep: cuts them into pieces, packs pieces of similar lengths
into micro-batches, and yields results in the order of rows."""

from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Any, Generic, Protocol, TypeVar

import torch

from ...io.devices.host_copy import Finding
from ...io.errors import PenstockError, readable
from ...scheduler.packing import pack
from ..files.parts import NumberedRows
from ..model import engine_of
from ..rows.row_error import RowError
from .findings import Findings
from .pools import micro_batches_in_flight, tokens_pooled
from .task_progress import ScoreProgress

_TOKENIZED_ROWS = 16
"""Rows that are given to the tokenizer in one call."""


@dataclass(slots=True)
class Row:
    """A row that is being computed. Its pieces are done one by one, in any order."""

    identity: Any
    num_pieces: int = 1
    pieces_left: int = 0
    error: str | None = None

    @property
    def is_done(self) -> bool:
        return self.error is not None or self.pieces_left == 0


R = TypeVar("R", bound=Row)


@dataclass(frozen=True, slots=True)
class RowPiece(Generic[R]):
    """The part of a row that goes through the model in one call."""

    row: R
    ids: tuple[int, ...]

    @property
    def num_tokens(self) -> int:
        """The most tokens of the piece that run through the model at a time."""
        return len(self.ids)


P = TypeVar("P", bound=RowPiece[Any])


class RowRunner(Protocol[R, P]):
    """What a task does with rows that run through the model once: cuts them into
    pieces, runs pieces, and makes results."""

    pad: int
    """The token id that stands at padding."""

    def cut(
        self, rows: Sequence[Mapping[str, Any]]
    ) -> Iterator[tuple[R, Sequence[P] | RowError]]:
        """Yields each of `rows` with its pieces, or with the error why it has none."""
        ...

    def run(
        self, pieces: Sequence[P], ids: torch.Tensor, mask: torch.Tensor
    ) -> Finding:
        """Runs the model on `pieces`. Returns what it finds, which is noted in their
        rows when it is taken. `ids` and `mask` are int64 [pieces, tokens] on the CPU,
        padded on the right, where `mask` is 0."""
        ...

    def result(self, row: R) -> dict[str, Any]:
        """The result of a row whose pieces are all done. Where the result is no number,
        it sets the row's error instead."""
        ...


class Packed(Generic[R, P]):
    """Runs the rows of a job in parts. No two parts share a micro-batch, so the results
    of a part are, bit for bit, the same without the others."""

    def __init__(
        self, model: Any, runner: RowRunner[R, P], progress: ScoreProgress
    ) -> None:
        self._engine = engine_of(model)
        policy = self._engine.policy
        self._runner = runner
        self._max_tokens = policy.micro_batch_tokens
        self._width = micro_batches_in_flight(policy)
        self._pool_tokens = tokens_pooled(policy)
        self._progress = progress
        self._pending: deque[R] = deque()
        self._findings = Findings(self._width)

    def run(self, parts: Iterator[NumberedRows]) -> Iterator[dict[str, Any]]:
        """Yields results in the order of rows: a finished row waits for those before
        it."""
        with self._engine.sweep(self._width, seed=0) as sweep:
            for outcome in sweep.run(self._compute, self._micro_batches(parts)):
                if outcome.error is not None:
                    raise outcome.error  # the job's: those of rows are in results
                self._findings.take()
                yield from self._finished()
            self._findings.finish()
        yield from self._finished()

    def _finished(self) -> Iterator[dict[str, Any]]:
        while self._pending and self._pending[0].is_done:
            row = self._pending.popleft()
            found = self._runner.result(row) if row.error is None else {}
            if row.error is not None:  # `result` may have set it
                found = {"id": row.identity, "error": row.error}
            self._progress.rows_done += 1
            self._progress.rows_failed += "error" in found
            yield found

    def _micro_batches(self, parts: Iterator[NumberedRows]) -> Iterator[list[P]]:
        """Takes rows as they are needed and groups pieces of similar lengths."""
        for part in parts:
            rows = (row for _, row in part)
            while pool := self._pool(rows):
                lengths = [piece.num_tokens for piece in pool]
                for group in pack(lengths, max_tokens=self._max_tokens):
                    yield [pool[index] for index in group]
            is_done = self._pending and self._pending[-1].is_done
            if is_done or self._engine.exchange is not None:  # all ranks do the same
                yield []  # so that its failed rows are yielded now

    def _pool(self, rows: Iterator[Mapping[str, Any]]) -> list[P]:
        pool: list[P] = []
        tokens = 0
        while tokens < self._pool_tokens:
            batch = list(islice(rows, _TOKENIZED_ROWS))
            if not batch:
                break
            for row, pieces in self._runner.cut(batch):
                self._pending.append(row)
                if isinstance(pieces, RowError):
                    row.error = str(pieces)
                    continue
                row.pieces_left = row.num_pieces = len(pieces)
                pool += pieces
                tokens += sum(piece.num_tokens for piece in pieces)
        return pool

    def _compute(self, pieces: list[P]) -> None:
        """Runs `pieces` as one micro-batch of the sweep. A PenstockError ends the
        job."""
        if not pieces:
            return
        progress = self._progress
        progress.micro_batches_done += 1
        num_rows = sum(1 / piece.row.num_pieces for piece in pieces)
        num_tokens = sum(len(piece.ids) for piece in pieces)
        progress.rows_in_flight += num_rows
        progress.tokens_in_flight += num_tokens
        try:
            self._run(pieces)
        finally:
            progress.rows_in_flight -= num_rows
            progress.tokens_in_flight -= num_tokens
            progress.rows_computed += num_rows

    def _run(self, pieces: Sequence[P]) -> None:
        """Runs the model. Its exceptions are errors of rows: pieces that fail together
        are run again one by one, so that one of them does not fail the others."""
        ids, mask = self._padded(pieces)
        try:
            finding = self._runner.run(pieces, ids, mask)
        except PenstockError:
            raise
        except Exception as error:
            if len(pieces) == 1:
                _end(pieces, error)
                return
            for piece in pieces:
                self._run([piece])
            return
        num_tokens = int(mask.sum())
        self._progress.tokens_done += num_tokens
        self._progress.tokens_padding += mask.numel() - num_tokens
        self._findings.add(finding, partial(_end, pieces))

    def _padded(self, pieces: Sequence[P]) -> tuple[torch.Tensor, torch.Tensor]:
        longest = max(len(piece.ids) for piece in pieces)
        ids = torch.full((len(pieces), longest), self._runner.pad, dtype=torch.int64)
        mask = torch.zeros_like(ids)
        for index, piece in enumerate(pieces):
            ids[index, : len(piece.ids)] = torch.tensor(piece.ids)
            mask[index, : len(piece.ids)] = 1
        return ids, mask


def _end(pieces: Sequence[RowPiece[Any]], error: Exception | None) -> None:
    """Counts `pieces` as done, or with `error` as failed."""
    for piece in pieces:
        piece.row.pieces_left -= 1
        if error is not None:
            why = f"the model failed: {type(error).__name__}: {error}"
            piece.row.error = readable(why)

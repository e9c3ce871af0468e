"""Scores of each token of a row, where `penstock score` gives their sum."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import xxhash

from ...io.devices.host_copy import Finding, HostCopy
from ...io.devices.queued_copy import queued_to
from ..tasks.head import padding_mask
from ..tasks.score import ScoredRow, ScoreRunner, TextWindow
from ..tasks.score_task import Score


@dataclass(frozen=True, slots=True)
class TokenScores:
    """What a model says of the scored tokens of a row, each given those before it."""

    logprobs: torch.Tensor
    """Natural log-probabilities: float32 [tokens]."""
    tops: torch.Tensor
    """What the model holds for most probable: int32 [tokens]."""
    ids_digest: int
    """A digest (63 bits) of all token ids of the row."""


@dataclass(frozen=True)
class TokenScoring(Score):
    """Scores rows token by token: a result is `{"id", "scores": TokenScores}`, or
    `{"id", "error"}`."""

    def runner(self, model: Any, tokenizer: Any) -> "TokenRunner":
        return TokenRunner(self, model, tokenizer)


class TokenRunner(ScoreRunner):
    """Like its base, and keeps the scores of each token until the row is done."""

    def run(
        self, pieces: Sequence[TextWindow], ids: torch.Tensor, mask: torch.Tensor
    ) -> Finding:
        found = self._scorer.predictions(
            queued_to(ids, self._device), padding_mask(mask, self._device)
        )

        def note(logprobs: torch.Tensor, tops: torch.Tensor) -> None:
            for window, of_row, best in zip(pieces, logprobs, tops, strict=True):
                part = of_row[window.places].clone()
                window.row.logprobs[window.start] = float(part.double().sum())
                top = best[window.places].to(torch.int32)
                window.row.details[window.start] = part, top, window.ids

        return Finding([HostCopy(found.logprobs), HostCopy(found.tops)], note)

    def result(self, row: ScoredRow) -> dict[str, Any]:
        if not super().result(row):
            return {}
        digest = xxhash.xxh3_64()
        windows = [row.details[start] for start in sorted(row.details)]
        for _, _, ids in windows:
            digest.update(torch.tensor(ids).numpy().tobytes())
        scores = TokenScores(
            torch.cat([logprobs for logprobs, _, _ in windows]),
            torch.cat([tops for _, tops, _ in windows]),
            digest.intdigest() >> 1,
        )
        return {"id": row.identity, "scores": scores}

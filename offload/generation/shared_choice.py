"""Lets one of the ranks that share a model choose the next tokens for all."""

from collections.abc import Callable, Sequence

import torch

from ..ranks.exchange import Exchange
from .logits import PromptFlags

Process = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


class SharedChoice:
    """A logits processor that calls `process`, all the others together, on the head's
    owner only: no other rank needs logits. What crosses is a token for each row, and
    whether each of `flags` is set for it: int64 [rows, 1 + flags].
    """

    def __init__(
        self, exchange: Exchange, process: Process, flags: Sequence[PromptFlags]
    ) -> None:
        self._exchange = exchange
        self._process = process
        self._flags = flags

    def __call__(self, ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """`scores` are [rows, vocabulary]. Returns the same shape and dtype: 0 for the
        chosen tokens, minus infinity for all others."""
        found = self._exchange.on_head(lambda: self._choose(ids, scores))
        if not self._exchange.is_head_owner:
            for place, flags in enumerate(self._flags, start=1):
                flags.add(found[:, place] > 0)
        return torch.full_like(scores, -torch.inf).scatter_(1, found[:, :1], 0.0)

    def _choose(self, ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        chosen = self._process(ids, scores).argmax(-1)
        none = torch.zeros_like(chosen)
        marks = (flags.current for flags in self._flags)
        return torch.stack(
            [chosen, *(none if mark is None else mark.long() for mark in marks)], dim=1
        )

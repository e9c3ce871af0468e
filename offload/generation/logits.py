"""What Penstock does to logits between a model and transformers' decoding: looks for
numbers that are none, and keeps padding from what looks at ids."""

from collections.abc import Sequence
from typing import Any

import torch

FILLS: dict[str, int | None] = {
    "NoRepeatNGramLogitsProcessor": -1,
    "RepetitionPenaltyLogitsProcessor": None,
}
"""By processor: what may stand for padding so that it makes no difference. None: the
row's own first id, of one that asks which ids there are; -1: no id, of one that asks
which stand behind each other."""


class FiniteCheck:
    """A logits processor that notes which prompts the model gave no usable logits: NaN,
    infinity, or nothing but minus infinity. They go on with zeros, and what becomes of
    them is to be thrown away."""

    def __init__(self, num_prompts: int) -> None:
        self._num_prompts = num_prompts
        self._prompts: list[int] = []
        """Of each sequence that is there, which stand side by side for a prompt."""
        self.is_bad: torch.Tensor | None = None
        """bool [sequences]."""
        self._bad: set[int] = set()

    def __call__(self, ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """`scores` are [sequences, vocabulary]."""
        if len(self._prompts) != len(scores):
            self.bad_prompts()
            each = max(1, len(scores) // self._num_prompts)
            self._prompts = [place // each for place in range(len(scores))]
        found = ~scores.amax(-1).isfinite()
        self.is_bad = found if self.is_bad is None else self.is_bad | found
        if found.device.type == "cpu" and not found.any():
            return scores  # elsewhere looking would wait for the device
        return scores.masked_fill(found[:, None], 0.0)

    def keep(self, rows: Sequence[int]) -> None:
        """The other sequences have ended."""
        self.bad_prompts()
        self._prompts = [self._prompts[row] for row in rows]

    def bad_prompts(self) -> set[int]:
        """Those that were noted so far."""
        flags, self.is_bad = self.is_bad, None
        if flags is not None:
            places = flags.nonzero().flatten().tolist()
            self._bad |= {self._prompts[place] for place in places}
        return self._bad


class Unpadded:
    """The logits processor `inner`, to which rows look as if they had no padding on the
    left: `starts` are the places of their first ids."""

    def __init__(self, inner: Any, starts: torch.Tensor) -> None:
        self._inner = inner
        self._fill = FILLS[type(inner).__name__]
        self._starts = starts[:, None]

    def keep(self, rows: Sequence[int]) -> None:
        """The others have ended."""
        self._starts = self._starts[list(rows)]

    def __call__(self, ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        is_pad = torch.arange(ids.shape[1], device=ids.device) < self._starts
        if self._fill is None:
            seen = torch.where(is_pad, ids.gather(1, self._starts), ids)
        else:
            seen = ids.masked_fill(is_pad, self._fill)
        found: torch.Tensor = self._inner(seen, scores)
        return found


def unpadded(processors: list[Any], starts: torch.Tensor) -> list[Unpadded]:
    """Makes those of `processors` that look at ids look at no padding, in place.
    `starts` are the places of the rows' first ids. Returns what was put there."""
    found: list[Unpadded] = []
    if not starts.any():
        return found
    for place, processor in enumerate(processors):
        if type(processor).__name__ in FILLS:
            found.append(Unpadded(processor, starts))
            processors[place] = found[-1]
    return found

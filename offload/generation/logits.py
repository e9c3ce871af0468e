"""Processes logits between a model and transformers' decoding.

Finds logits that are not finite, and hides padding from processors that look at ids.
"""

from collections.abc import Sequence
from typing import Any

import torch

FILLS: dict[str, int | None] = {
    "NoRepeatNGramLogitsProcessor": -1,
    "RepetitionPenaltyLogitsProcessor": None,
}
"""The id that may replace padding without an effect, by processor.

None stands for the row's own first id, for a processor that asks which ids occur. -1 is
no id, for one that asks which ids follow each other.
"""


class FiniteCheck:
    """A logits processor that notes which prompts got no usable logits.

    Those are NaN, infinity, or only minus infinity. The prompts continue with zeros;
    their results must be thrown away.
    """

    def __init__(self, num_prompts: int) -> None:
        self._num_prompts = num_prompts
        self._prompts: list[int] = []
        """The prompt of each sequence; the sequences of one prompt are next to each
        other."""
        self.is_bad: torch.Tensor | None = None
        """Which sequences had unusable logits since the last `bad_prompts`: bool
        [sequences]."""
        self._bad: set[int] = set()

    def __call__(self, ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """`scores` are [sequences, vocabulary]; so is the result, with zeros for
        sequences without usable logits."""
        if len(self._prompts) != len(scores):
            self.bad_prompts()
            each = max(1, len(scores) // self._num_prompts)
            self._prompts = [place // each for place in range(len(scores))]
        found = ~scores.amax(-1).isfinite()
        self.is_bad = found if self.is_bad is None else self.is_bad | found
        if found.device.type == "cpu" and not found.any():
            return scores  # on a GPU, this test would wait for the device
        return scores.masked_fill(found[:, None], 0.0)

    def keep(self, rows: Sequence[int]) -> None:
        """Keeps only the sequences `rows`: the others have ended."""
        self.bad_prompts()
        self._prompts = [self._prompts[row] for row in rows]

    def bad_prompts(self) -> set[int]:
        """The prompts that were noted so far."""
        flags, self.is_bad = self.is_bad, None
        if flags is not None:
            found = zip(self._prompts, flags.tolist(), strict=True)
            self._bad |= {prompt for prompt, is_bad in found if is_bad}
        return self._bad


class Unpadded:
    """Calls the logits processor `inner` with ids whose left padding is replaced.

    `starts`, int64 [rows], are the positions of the rows' first ids.
    """

    def __init__(self, inner: Any, starts: torch.Tensor) -> None:
        self._inner = inner
        self._fill = FILLS[type(inner).__name__]
        self._starts = starts[:, None]

    def keep(self, rows: Sequence[int]) -> None:
        """Keeps only the rows with these indices: the others have ended."""
        self._starts = self._starts[list(rows)]

    def __call__(self, ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """`ids`: int64 [rows, tokens]; `scores` and the result: [rows, vocabulary],
        of one dtype."""
        is_pad = torch.arange(ids.shape[1], device=ids.device) < self._starts
        if self._fill is None:
            seen = torch.where(is_pad, ids.gather(1, self._starts), ids)
        else:
            seen = ids.masked_fill(is_pad, self._fill)
        found: torch.Tensor = self._inner(seen, scores)
        return found


def unpadded(
    processors: list[Any], starts: Sequence[int], device: torch.device
) -> list[Unpadded]:
    """Replaces those of `processors` that look at ids by ones that do not see padding.

    `starts` are the positions of the rows' first ids, which are on `device`. Returns
    the new ones.
    """
    found: list[Unpadded] = []
    if not any(starts):
        return found
    for place, processor in enumerate(processors):
        if type(processor).__name__ in FILLS:
            found.append(Unpadded(processor, torch.tensor(starts, device=device)))
            processors[place] = found[-1]
    return found

"""Processes logits between a model and transformers' decoding.

Finds logits that are not finite, and hides padding from processors that look at ids.
"""

from collections.abc import Sequence
from typing import Any

import torch

from ...io.devices.host_copy import HostCopy
from ...io.devices.known import rows_of
from ...io.devices.queued_copy import queued_to

FILLS: dict[str, int | None] = {
    "NoRepeatNGramLogitsProcessor": -1,
    "RepetitionPenaltyLogitsProcessor": None,
}
"""The id that may replace padding without an effect, by processor.

None stands for the row's own first id, for a processor that asks which ids occur. -1 is
no id, for one that asks which ids follow each other.
"""


class PromptFlags:
    """Collects of which prompts something is true. Nobody waits for the device until
    `prompts`."""

    def __init__(self, num_prompts: int) -> None:
        self._num_prompts = num_prompts
        self._prompts: list[int] = []
        """The prompt of each sequence; the sequences of one prompt are next to each
        other."""
        self.current: torch.Tensor | None = None
        """Of which sequences it was true since the last `store`: bool [sequences]."""
        self._stored: list[tuple[list[int], HostCopy]] = []

    def add(self, found: torch.Tensor) -> None:
        """`found` is bool [sequences]."""
        if len(self._prompts) != len(found):
            self.store()
            each = max(1, len(found) // self._num_prompts)
            self._prompts = [place // each for place in range(len(found))]
        self.current = found if self.current is None else self.current | found

    def keep(self, rows: Sequence[int]) -> None:
        """Keeps only the sequences `rows`: the others have ended."""
        self.store()
        self._prompts = [self._prompts[row] for row in rows] if self._prompts else []

    def store(self) -> None:
        """Queues a copy of the flags to host memory."""
        flags, self.current = self.current, None
        if flags is not None:
            self._stored.append((self._prompts, HostCopy(flags)))

    def prompts(self) -> set[int]:
        """The prompts of which it was true at any time."""
        self.store()
        return {
            prompt
            for prompts, copy in self._stored
            for prompt, flag in zip(prompts, copy.wait().tolist(), strict=True)
            if flag
        }


class FiniteCheck:
    """A logits processor that notes which prompts got no usable logits.

    Those are NaN, infinity, or only minus infinity. The prompts continue with zeros;
    their results must be thrown away.
    """

    def __init__(self, num_prompts: int) -> None:
        self.bad = PromptFlags(num_prompts)

    def __call__(self, ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """`scores` are [sequences, vocabulary]; so is the result, with zeros for
        sequences without usable logits."""
        found = ~scores.amax(-1).isfinite()
        self.bad.add(found)
        if found.device.type == "cpu" and not found.any():
            return scores  # on a GPU, this test would wait for the device
        return scores.masked_fill(found[:, None], 0.0)

    def keep(self, rows: Sequence[int]) -> None:
        """Keeps only the sequences `rows`: the others have ended."""
        self.bad.keep(rows)


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
        self._starts = rows_of(self._starts, rows)

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
            found.append(Unpadded(processor, queued_to(torch.tensor(starts), device)))
            processors[place] = found[-1]
    return found

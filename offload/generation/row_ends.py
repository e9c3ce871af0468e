"""Where and why the rows of a micro-batch end, while transformers decodes them."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import MaxLengthCriteria, StoppingCriteriaList

from ...io.devices.host_copy import HostCopy
from ..ranks.exchange import Exchange
from .decoding_options import DecodingOptions
from .logits import PromptFlags
from .stopping import Ended


@dataclass(slots=True)
class RowEnds:
    """Where the rows of one micro-batch ended; filled while it runs."""

    start: int = 0
    """The number of ids before the first new one: the prompt, or the start of the
    decoder."""
    num_steps: int = 0
    lengths: dict[int, int] = field(default_factory=dict)
    """The number of new tokens by row, including the end-of-text token."""
    stopped: set[int] = field(default_factory=set)
    """Rows that ended by an end-of-text token or a stop string, not by the limit."""
    coming: HostCopy | None = None
    """Which `rows` have ended in the last step, and which of them by themselves: bool
    [rows, 2]; None once it is noted."""
    rows: Sequence[int] = ()

    def note(self) -> None:
        """Notes what is coming, and waits for it."""
        if self.coming is None:
            return
        flags, self.coming = self.coming.wait().tolist(), None
        for row, (is_done, is_own) in zip(self.rows, flags, strict=True):
            if is_done and row not in self.lengths:
                self.lengths[row] = self.num_steps
                if is_own:
                    self.stopped.add(row)


class Steps:
    """Knows which micro-batch has queued a step last."""

    def __init__(self) -> None:
        self._last: object = None

    def add(self, who: object) -> bool:
        """`who` has queued a step. Returns whether the one before was its own, too."""
        was_last, self._last = self._last is who, who
        return was_last

    def is_last(self, who: object) -> bool:
        """Whether no step of another micro-batch is queued behind the last one of
        `who`, so that the device may idle while somebody waits for it."""
        return self._last is who


class RowsEnded(Exception):
    """Leaves transformers' loop: the rows have ended, or are fewer from now on."""


class Watched(StoppingCriteriaList):
    """Wraps stopping criteria, and records which of `rows` met one, and when.

    With `shrinks`, all rows stop once half of them have ended; `left` are those that
    have to continue.

    On an accelerator, nobody waits for a step when it has just been queued: `arrive`
    looks at it when the micro-batch comes to a site of the next step. By then, those of
    the other micro-batches are queued behind it. With an `exchange`, the micro-batch
    waits for what the head's owner says has ended, so that all ranks stop at the same
    step.
    """

    def __init__(
        self,
        criteria: StoppingCriteriaList,
        ends: RowEnds,
        tick: Callable[[int], None],
        rows: Sequence[int],
        *,
        shrinks: bool,
        flags: Sequence[PromptFlags],
        steps: Steps,
        exchange: Exchange | None = None,
    ) -> None:
        super().__init__(criteria)
        self._exchange = exchange
        self._flags = flags
        self._ends = ends
        self._tick = tick
        self._rows = rows
        self._shrinks = shrinks
        self._steps = steps
        self._num_sites = 0
        self._is_alone = False
        self.left: list[int] = []
        """Indices into `rows`."""
        self.ids: torch.Tensor | None = None
        """The ids of all rows after the last step: int64 [rows, tokens]."""

    def __call__(self, input_ids: Any, scores: Any, **kwargs: Any) -> Any:
        ends, rows = self._ends, self._rows
        ends.note()
        ends.num_steps += 1
        self.ids, self._num_sites = input_ids, 0
        done = torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)
        by_itself = torch.zeros_like(done)
        is_last = False
        for criterion in self:
            met = criterion(input_ids, scores, **kwargs)
            done |= met
            if isinstance(criterion, MaxLengthCriteria):
                is_last |= input_ids.shape[1] >= criterion.max_length
            else:
                by_itself |= met
        for flags in self._flags:
            if flags.current is not None:
                done |= flags.current  # their results are thrown away
        self._tick(sum(row not in ends.lengths for row in rows))
        stops, is_host = is_last or self._stops(), done.device.type == "cpu"
        ends.coming = self._coming(torch.stack([done, by_itself], dim=1))
        ends.rows = rows
        self._is_alone = self._steps.add(ends)
        if is_host or self._exchange is not None:
            ends.note()
            stops = self._stops()
        if not is_host:
            return Ended.of(done, stops=stops)
        return torch.ones_like(done) if stops else done

    def _coming(self, found: torch.Tensor) -> HostCopy:
        exchange = self._exchange
        if exchange is None or found.device.type == "cpu":
            return HostCopy(found)
        return HostCopy(exchange.on_head(lambda: found, on_host=True))

    def arrive(self) -> None:
        """The micro-batch may run a site, after others have run theirs. Raises
        RowsEnded to leave the loop."""
        coming = self._ends.coming
        self._num_sites += 1
        if coming is None or self.ids is None:
            return
        # The last one of a pass waits at its second site: the first one is often an
        # embedding, and short; other micro-batches have run the second one by then.
        if (
            coming.has_arrived
            or self._is_alone
            or self._num_sites > 1
            or not self._steps.is_last(self._ends)
        ):
            self._ends.note()
            if self._stops():
                raise RowsEnded

    def _stops(self) -> bool:
        """Whether the loop has to stop, by what is noted. Sets `left`."""
        rows = enumerate(self._rows)
        left = [place for place, row in rows if row not in self._ends.lengths]
        if self._shrinks and 0 < 2 * len(left) <= len(self._rows):
            self.left = left
        return not left or bool(self.left)


def ends_of(
    found: torch.Tensor,
    start: int,
    way: DecodingOptions,
    criteria: StoppingCriteriaList,
) -> RowEnds:
    """Where each row of `found` [rows, tokens] ended: at its first end of text, or at
    its last token.

    For rows that no `Decoder` has watched. They are padded to the longest one.
    """
    ends = RowEnds(start)
    for row, ids in enumerate(found[:, start:].tolist()):
        length = next(
            (
                i + 1
                for i, token in enumerate(ids)
                if token in way.ends
                or (criteria and criteria(found[[row], : start + i + 1], None).any())
            ),
            None,
        )
        ends.lengths[row] = len(ids) if length is None else length
        if length is not None or len(ids) < way.max_new_tokens:
            ends.stopped.add(row)
    return ends

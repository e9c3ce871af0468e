"""Extends transformers' decoding.

Each row has its own random state, it is recorded where and why each row ended, and rows
that have ended are dropped.
"""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy
import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import MaxLengthCriteria, StoppingCriteriaList

from ..units.model_kind import is_plain
from .logits import FiniteCheck, unpadded
from .shrinking import may_shrink, shrunk


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


class RowSampler:
    """A logits processor that draws the next token of each row with its own generator.

    So a row does not depend on the others beside it. All other tokens become
    impossible, and the greedy choice that follows takes the drawn one.
    """

    def __init__(self, seeds: Sequence[int]) -> None:
        self._generators = [torch.Generator().manual_seed(seed) for seed in seeds]

    def keep(self, rows: Sequence[int]) -> None:
        """Keeps only the rows with these indices: the others have ended."""
        self._generators = [self._generators[row] for row in rows]

    def __call__(self, ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """`scores` are [rows, vocabulary], processed by all other processors. Returns
        the same shape and dtype: 0 for the drawn tokens, minus infinity for all
        others."""
        probabilities = scores.float().softmax(-1).cpu()
        drawn = [
            torch.multinomial(row, 1, generator=generator)
            for row, generator in zip(probabilities, self._generators, strict=True)
        ]
        chosen = torch.stack(drawn).to(scores.device)
        return torch.full_like(scores, -torch.inf).scatter_(1, chosen, 0.0)


class _Watched(StoppingCriteriaList):
    """Wraps stopping criteria, and records which of `rows` met one, and when.

    With `shrinks`, all rows stop once half of them have ended; `left` are those that
    have to continue.
    """

    def __init__(
        self,
        criteria: StoppingCriteriaList,
        ends: RowEnds,
        tick: Callable[[int], None],
        rows: Sequence[int],
        *,
        shrinks: bool,
        check: FiniteCheck | None = None,
    ) -> None:
        super().__init__(criteria)
        self._check = check
        self._ends = ends
        self._tick = tick
        self._rows = rows
        self._shrinks = shrinks
        self.left: list[int] = []
        """Indices into `rows`."""

    def __call__(self, input_ids: Any, scores: Any, **kwargs: Any) -> Any:
        ends, rows = self._ends, self._rows
        ends.num_steps += 1
        done = torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)
        by_itself = torch.zeros_like(done)
        for criterion in self:
            met = criterion(input_ids, scores, **kwargs)
            done |= met
            if not isinstance(criterion, MaxLengthCriteria):
                by_itself |= met
        if self._check is not None and self._check.is_bad is not None:
            done |= self._check.is_bad  # their results are thrown away
        self._tick(sum(row not in ends.lengths for row in rows))
        # One copy for both: on a GPU it waits for the micro-batch's work.
        for row, (is_done, is_own) in zip(
            rows, torch.stack([done, by_itself], dim=1).tolist(), strict=True
        ):
            if is_done and row not in ends.lengths:
                ends.lengths[row] = ends.num_steps
                if is_own:
                    ends.stopped.add(row)
        if self._shrinks:
            left = [p for p, row in enumerate(rows) if row not in ends.lengths]
            if 0 < 2 * len(left) <= len(rows):
                self.left = left
                return torch.ones_like(done)
        return done


def row_seed(seed: int, row: int, number: int) -> int:
    """The seed of completion `number` of `row`.

    A CPU generator uses 32 bits of its seed, so those of different rows must differ
    there.
    """
    mixed = numpy.random.SeedSequence((seed % 2**64, row, number))
    return int(mixed.generate_state(1)[0])


@dataclass(frozen=True, slots=True)
class Decoder:
    """A `custom_generate` for greedy decoding and sampling, which calls transformers'
    own loop.

    `draws` are (seed, number) for each prompt; each row samples for itself. `ends` is
    filled. `check` notes rows without usable logits. `tick(rows)` is called at each
    step with the number of rows that got a token. `chunk_tokens` and `leave` have an
    effect only if the cache holds only keys and values.
    """

    draws: Sequence[tuple[int, int]]
    starts: Sequence[int]
    """The number of padding tokens before each prompt."""
    ends: RowEnds
    tick: Callable[[int], None]
    check: FiniteCheck | None = None
    chunk_tokens: int | None = None
    """Prompts run in calls of at most this many tokens of each row; None: in one
    call."""
    leave: Callable[[int], None] | None = None
    """Called with the number of rows that leave the micro-batch, when half of the rows
    have ended. None: ended rows stay as padding until all have ended."""

    def __call__(
        self,
        model: Any,
        input_ids: torch.Tensor,
        logits_processor: Any,
        stopping_criteria: Any,
        generation_config: Any,
        **kwargs: Any,
    ) -> torch.Tensor:
        """Returns the ids, int64 [rows, tokens], padded after the end of each row."""
        self.ends.start = input_ids.shape[1]
        config = copy.copy(generation_config)
        keeps_plain = is_plain(kwargs.get("past_key_values"))
        shrinks = (
            keeps_plain
            and self.leave is not None
            and not config.return_dict_in_generate
            and may_shrink(logits_processor, kwargs, len(input_ids))
        )
        if keeps_plain and config.prefill_chunk_size is None:
            config.prefill_chunk_size = self.chunk_tokens
        sampler = RowSampler(self._seeds(len(input_ids)))
        each = len(input_ids) // len(self.draws)
        starts = [start for start in self.starts for _ in range(each)]
        keepers: list[Any] = [sampler]
        keepers += unpadded(logits_processor, starts, input_ids.device)
        if self.check is not None:
            logits_processor.insert(0, self.check)
            keepers.append(self.check)
        if config.do_sample:
            logits_processor.append(sampler)
            config.do_sample = False
        rows = list(range(len(input_ids)))
        found: dict[int, torch.Tensor] = {}
        while True:
            watched = _Watched(
                stopping_criteria,
                self.ends,
                self.tick,
                rows,
                shrinks=shrinks,
                check=self.check,
            )
            ids = model._sample(
                input_ids,
                logits_processor=logits_processor,
                stopping_criteria=watched,
                generation_config=config,
                **kwargs,
            )
            if not (left := watched.left) and not found:
                return ids  # type: ignore[no-any-return]
            found.update(zip(rows, ids, strict=True))
            if not left:
                break
            new = ids.shape[1] - input_ids.shape[1]
            kwargs = shrunk(model, kwargs, ids, left, num_new_tokens=new)
            for keeper in keepers:
                keeper.keep(left)
            assert self.leave is not None, "only a decoder with `leave` shrinks"
            self.leave(len(rows) - len(left))
            input_ids, rows = ids[left], [rows[place] for place in left]
            config.prefill_chunk_size = None
        return pad_sequence(
            [found[row] for row in range(len(found))],
            batch_first=True,
            padding_value=config.pad_token_id,
        )

    def _seeds(self, num_rows: int) -> list[int]:
        each = range(num_rows // len(self.draws))  # num_return_sequences
        return [row_seed(seed, row, n) for seed, row in self.draws for n in each]

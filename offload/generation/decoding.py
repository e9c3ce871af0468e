"""What Penstock adds to transformers' own decoding: a random state for each row, a
record of where each ended and why, and no more work for those that have."""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy
import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import MaxLengthCriteria, StoppingCriteriaList

from ..units.cache_kind import is_plain
from .logits import FiniteCheck, unpadded
from .shrinking import may_shrink, shrunk


@dataclass(slots=True)
class RowEnds:
    """Where the rows of one micro-batch ended; filled as they do."""

    start: int = 0
    """Ids before the first new one: the prompt, or the decoder's start."""
    num_steps: int = 0
    lengths: dict[int, int] = field(default_factory=dict)
    """New tokens, by row, an end-of-text token included."""
    stopped: set[int] = field(default_factory=set)
    """Rows that ended by themselves, not by the limit."""


class RowSampler:
    """Draws each row's next token by a generator of its own, so that it does not
    depend on the rows beside it. A logits processor: all other tokens become
    impossible, and what picks the likeliest picks the one that was drawn."""

    def __init__(self, seeds: Sequence[int]) -> None:
        self._generators = [torch.Generator().manual_seed(seed) for seed in seeds]

    def keep(self, rows: Sequence[int]) -> None:
        """The others have ended."""
        self._generators = [self._generators[row] for row in rows]

    def __call__(self, ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """`scores` (rows x vocabulary), as warped by all processors before this."""
        probabilities = scores.float().softmax(-1).cpu()
        drawn = [
            torch.multinomial(row, 1, generator=generator)
            for row, generator in zip(probabilities, self._generators, strict=True)
        ]
        chosen = torch.stack(drawn).to(scores.device)
        return torch.full_like(scores, -torch.inf).scatter_(1, chosen, 0.0)


class _Watched(StoppingCriteriaList):
    """The criteria as they are, and a record of which of `rows` met one, and when.

    With `shrinks` all stop once a half has: `left` are those that have to go on.
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
        """Places among `rows`."""

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
            done |= self._check.is_bad  # nothing comes of these
        self._tick(sum(row not in ends.lengths for row in rows))
        for place in done.nonzero().flatten().tolist():
            row = rows[place]
            if row not in ends.lengths:
                ends.lengths[row] = ends.num_steps
                if by_itself[place]:
                    ends.stopped.add(row)
        if self._shrinks:
            left = [p for p, row in enumerate(rows) if row not in ends.lengths]
            if 0 < 2 * len(left) <= len(rows):
                self.left = left
                return torch.ones_like(done)
        return done


def row_seed(seed: int, row: int, number: int) -> int:
    """Of the `number`-th completion of `row`. A CPU generator looks at 32 bits of its
    seed: those of different rows must differ there."""
    mixed = numpy.random.SeedSequence((seed % 2**64, row, number))
    return int(mixed.generate_state(1)[0])


@dataclass(frozen=True, slots=True)
class Decoder:
    """A `custom_generate` for greedy decoding and sampling: transformers' own loop.

    `draws` are the seeds of the rows, each with its number under that seed: each
    samples for itself. `ends` is filled; `check` notes rows without usable logits;
    `tick(rows)` is called at each step with how many rows got a token. What follows is
    done for models that keep only keys and values, as far as the model has not made
    itself a cache of another kind:
    """

    draws: Sequence[tuple[int, int]]
    starts: Sequence[int]
    """How many padding tokens stand before each row."""
    ends: RowEnds
    tick: Callable[[int], None]
    check: FiniteCheck | None = None
    chunk_tokens: int | None = None
    """Prompts come in with calls of at most so many tokens of each row; None: all."""
    leave: Callable[[int], None] | None = None
    """When a half of the rows have ended, they leave the micro-batch: it is called with
    how many. None: they go on as padding until all have."""

    def __call__(
        self,
        model: Any,
        input_ids: torch.Tensor,
        logits_processor: Any,
        stopping_criteria: Any,
        generation_config: Any,
        **kwargs: Any,
    ) -> torch.Tensor:
        """[rows, tokens], padded behind a row's end."""
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
        starts = torch.tensor(self.starts, device=input_ids.device)
        keepers: list[Any] = [sampler]
        keepers += unpadded(logits_processor, starts.repeat_interleave(each))
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
            assert self.leave is not None, "or it would not shrink"
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

"""Extends transformers' decoding: each row has its own random state, and rows that have
ended are dropped."""

import copy
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy
import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import LogitsProcessorList

from ...io.devices.known import rows_of
from ...io.devices.queued_copy import queued_to
from ..model import engine_of
from ..traces.model_kind import is_plain
from .logits import FiniteCheck, PromptFlags, unpadded
from .row_ends import RowEnds, RowsEnded, Steps, Watched
from .shared_choice import SharedChoice
from .shrinking import may_shrink, shrunk

Watch = Callable[[Callable[[], None] | None], None]
IMPOSSIBLE = "probability tensor contains either `inf`, `nan` or element < 0"
"""What torch says of probabilities from which nothing can be drawn."""


class RowSampler:
    """A logits processor that draws the next token of each row with its own generator.

    So a row does not depend on the others beside it. All other tokens become
    impossible, and the greedy choice that follows takes the drawn one.

    Random numbers are made on the CPU, and are the same for all devices. `impossible`
    notes the rows from whose probabilities nothing can be drawn.
    """

    def __init__(
        self,
        seeds: Sequence[int],
        impossible: PromptFlags | None = None,
    ) -> None:
        self._generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        self.impossible = impossible or PromptFlags(len(seeds))

    def keep(self, rows: Sequence[int]) -> None:
        """Keeps only the rows with these indices: the others have ended."""
        self._generators = [self._generators[row] for row in rows]
        self.impossible.keep(rows)

    def __call__(self, ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """`scores` are [rows, vocabulary], processed by all other processors. Returns
        the same shape and dtype: 0 for the drawn tokens, minus infinity for all
        others."""
        chosen = self._draw(scores)
        return torch.full_like(scores, -torch.inf).scatter_(1, chosen, 0.0)

    def _draw(self, scores: torch.Tensor) -> torch.Tensor:
        """The token of each row: int64 [rows, 1]."""
        probabilities = scores.float().softmax(-1)
        if probabilities.device.type == "cpu":
            drawn = [
                torch.multinomial(row, 1, generator=generator)
                for row, generator in zip(probabilities, self._generators, strict=True)
            ]
            return torch.stack(drawn)
        # What `multinomial` does, without its wait for the probabilities.
        shape = probabilities.shape[-1:]
        noise = [
            torch.empty(shape, device="cpu").exponential_(1, generator=generator)
            for generator in self._generators
        ]
        there = queued_to(torch.stack(noise), probabilities.device)
        self.impossible.add(~probabilities.isfinite().all(-1))
        return (probabilities / there).argmax(-1, keepdim=True)


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
    impossible: PromptFlags
    """Of which prompts nothing could be drawn; filled."""
    steps: Steps
    """Those of all micro-batches that run together."""
    watch: Watch
    """Sets what is called when the running micro-batch may run a site."""
    begin: Callable[[], object]
    """Called first: `generate` has prepared its inputs."""
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
        self.begin()
        input_ids = input_ids.as_subclass(torch.Tensor)
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
        seeds, exchange = self._seeds(len(input_ids)), engine_of(model).exchange
        sampler = RowSampler(seeds, self.impossible)
        each = len(input_ids) // len(self.draws)
        starts = [start for start in self.starts for _ in range(each)]
        keepers: list[Any] = [sampler]
        keepers += unpadded(logits_processor, starts, input_ids.device)
        flags = [self.impossible]
        if self.check is not None:
            logits_processor.insert(0, self.check)
            keepers.append(self.check)
            flags.append(self.check.bad)
        if config.do_sample:
            logits_processor.append(sampler)
            config.do_sample = False
        staying: Callable[[], AbstractContextManager[None]] = nullcontext
        if exchange is not None:
            choice = SharedChoice(exchange, logits_processor, flags)
            logits_processor = LogitsProcessorList([choice])
            staying = partial(exchange.kept_back.staying, with_head=True)
        rows = list(range(len(input_ids)))
        found: dict[int, torch.Tensor] = {}
        while True:
            watched = Watched(
                stopping_criteria,
                self.ends,
                self.tick,
                rows,
                shrinks=shrinks,
                flags=flags,
                steps=self.steps,
                exchange=exchange,
            )
            self.watch(watched.arrive)
            try:
                with staying():
                    ids = model._sample(
                        input_ids,
                        logits_processor=logits_processor,
                        stopping_criteria=watched,
                        generation_config=config,
                        **kwargs,
                    )
            except RowsEnded:
                assert watched.ids is not None, "it has run a step"
                ids = watched.ids
            finally:
                self.watch(None)
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
            input_ids, rows = rows_of(ids, left), [rows[place] for place in left]
            config.prefill_chunk_size = None
        return pad_sequence(
            [found[row] for row in range(len(found))],
            batch_first=True,
            padding_value=config.pad_token_id,
        )

    def _seeds(self, num_rows: int) -> list[int]:
        each = range(num_rows // len(self.draws))  # num_return_sequences
        return [row_seed(seed, row, n) for seed, row in self.draws for n in each]

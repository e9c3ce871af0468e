"""What Penstock adds to transformers' own decoding: a random state for each row, and a
record of where each row ended and why."""

import copy
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy
import torch
from transformers import DynamicCache, MaxLengthCriteria, StoppingCriteriaList
from transformers.cache_utils import DynamicLayer


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
    """The criteria as they are, and a record of which row met one, and when."""

    def __init__(
        self, criteria: StoppingCriteriaList, ends: RowEnds, tick: Callable[[int], None]
    ) -> None:
        super().__init__(criteria)
        self._ends = ends
        self._tick = tick

    def __call__(self, input_ids: Any, scores: Any, **kwargs: Any) -> Any:
        ends = self._ends
        ends.num_steps += 1
        done = torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)
        by_itself = torch.zeros_like(done)
        for criterion in self:
            met = criterion(input_ids, scores, **kwargs)
            done |= met
            if not isinstance(criterion, MaxLengthCriteria):
                by_itself |= met
        self._tick(len(input_ids) - len(ends.lengths))
        for row in done.nonzero().flatten().tolist():
            if row not in ends.lengths:
                ends.lengths[row] = ends.num_steps
                if by_itself[row]:
                    ends.stopped.add(row)
        return done


def row_seed(seed: int, row: int, number: int) -> int:
    """Of the `number`-th completion of `row`. A CPU generator looks at 32 bits of its
    seed: those of different rows must differ there."""
    mixed = numpy.random.SeedSequence((seed % 2**64, row, number))
    return int(mixed.generate_state(1)[0])


def takes_chunks(model: Any) -> bool:
    """Whether a prompt may come in with several calls: what the model keeps is keys and
    values alone. Layers with a state of another kind may begin it anew at every call of
    more than one token, and say nothing."""
    config = model.config.get_text_config(decoder=True)
    return (
        not model.config.is_encoder_decoder
        and not getattr(model, "_is_stateful", False)
        and "past_key_values" in inspect.signature(model.forward).parameters
        and _is_plain(DynamicCache(config=config))
    )


def _is_plain(cache: Any) -> bool:
    return type(cache) is DynamicCache and all(
        isinstance(layer, DynamicLayer) for layer in cache.layers
    )


def decoder(
    seed: int,
    rows: Sequence[int],
    ends: RowEnds,
    tick: Callable[[int], None],
    *,
    chunk_tokens: int | None,
) -> Callable[..., Any]:
    """A `custom_generate` for greedy decoding and sampling: transformers' own loop.

    Each of `rows` (their numbers) samples for itself. `ends` is filled; `tick(rows)` is
    called at each step with how many rows got a token. Prompts come in with calls of at
    most `chunk_tokens` of each row (None: at once), unless the model made itself a
    cache of another kind.
    """

    def decode(
        model: Any,
        input_ids: torch.Tensor,
        logits_processor: Any,
        stopping_criteria: Any,
        generation_config: Any,
        **kwargs: Any,
    ) -> Any:
        ends.start = input_ids.shape[1]
        generation_config = copy.copy(generation_config)
        if (
            chunk_tokens is not None
            and generation_config.prefill_chunk_size is None
            and _is_plain(kwargs.get("past_key_values"))
        ):
            generation_config.prefill_chunk_size = chunk_tokens
        if generation_config.do_sample:
            each = range(len(input_ids) // len(rows))  # num_return_sequences
            seeds = [row_seed(seed, row, number) for row in rows for number in each]
            logits_processor.append(RowSampler(seeds))
            generation_config.do_sample = False
        return model._sample(
            input_ids,
            logits_processor=logits_processor,
            stopping_criteria=_Watched(stopping_criteria, ends, tick),
            generation_config=generation_config,
            **kwargs,
        )

    return decode

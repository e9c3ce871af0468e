"""Runs one micro-batch of prompts through transformers' `generate`, and decodes its
tokens."""

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from transformers import LogitsProcessorList, StoppingCriteriaList

from ...io.devices.host_copy import Finding, HostCopy
from ...io.devices.known import knowing_constants, known_to
from ...io.errors import UsageError, readable
from ..model import engine_of
from ..rows.limits import Limits
from ..rows.row_error import RowError
from .decoding import IMPOSSIBLE, Decoder, Watch, row_seed
from .decoding_options import NOT_HERE, DecodingOptions, criteria_of, way_of
from .logits import FiniteCheck, PromptFlags
from .row_ends import RowEnds, Steps, ends_of
from .row_sampling import RowSampling

_NOT_FINITE = (
    "the model gave logits that are not finite: its weights or its dtype overflow on "
    "this text"
)
_IMPOSSIBLE = f"the model failed: RuntimeError: {IMPOSSIBLE}"


@dataclass(slots=True)
class Prompt:
    """A row that is being completed."""

    index: int
    identity: Any
    way: DecodingOptions
    ids: tuple[int, ...] = ()
    seed: int | None = None
    """The row's own seed; then the row's number does not matter."""
    result: dict[str, Any] | None = None

    def fail(self, message: str) -> None:
        self.result = {"id": self.identity, "error": readable(message)}


class Completions:
    """Completes micro-batches with the same options, except for those that rows set.

    Raises UsageError for options that transformers does not know.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        limits: Limits,
        *,
        max_new_tokens: int,
        stop: tuple[str, ...],
        seed: int,
        options: Mapping[str, Any],
        note: Callable[[str], None],
    ) -> None:
        self.tokenizer = tokenizer
        self._model = model
        self._default = model.generation_config
        self._limits = limits
        self._device = engine_of(model).device
        self._max_new_tokens = max_new_tokens
        self._stop = stop
        self._seed = seed
        self._options = options
        self._pads_left = not model.config.is_encoder_decoder
        self.way = self._way(RowSampling(), note)
        """The options for rows that set none."""
        self._criteria = criteria_of(tokenizer, self.way.stop)
        self._ways: dict[RowSampling, DecodingOptions] = {}
        self._steps = Steps()

    @contextmanager
    def defaults_taken_over(self) -> Iterator[None]:
        """Removes from the model's generation config meanwhile what Penstock does
        itself, or leaves out.

        transformers' `generate` takes from there what its options leave open. It would
        use stop strings in addition to Penstock's, and would need a tokenizer for that.
        """
        before = self._model.generation_config
        removed = [k for k in ("stop_strings", *NOT_HERE) if getattr(before, k, None)]
        if removed:
            self._model.generation_config = copy.deepcopy(before)
            for key in removed:
                setattr(self._model.generation_config, key, None)
        try:
            yield
        finally:
            self._model.generation_config = before

    def way_for(self, sampling: RowSampling) -> DecodingOptions:
        """The options for a row with `sampling`; the same object for equal ones, until
        `forget_ways`.

        Raises RowError if they cannot be combined.
        """
        if sampling == RowSampling():
            return self.way
        if sampling not in self._ways:
            try:
                self._ways[sampling] = self._way(sampling, lambda text: None)
            except UsageError as error:
                raise RowError(f"what the row asks for is refused: {error}") from error
        return self._ways[sampling]

    def forget_ways(self) -> None:
        """Forgets the options of rows: later rows share no micro-batch with earlier
        ones."""
        self._ways.clear()

    def run(
        self,
        prompts: Sequence[Prompt],
        tick: Callable[[int], None],
        watch: Watch,
        *,
        chunk_tokens: int | None = None,
        leave: Callable[[int], None] | None = None,
    ) -> Finding:
        """Completes `prompts`, which have the same options. Sets the `result` of each
        when what is returned is taken.

        `tick(rows)` is called when so many rows have got a token. For the others see
        `Decoder`.
        """
        way = prompts[0].way
        try:
            criteria = self._criteria_of(way)
        except UsageError as error:
            for prompt in prompts:
                prompt.fail(f"what the row asks for is refused: {error}")
            return Finding([], lambda: None)
        ids, mask = self._padded([prompt.ids for prompt in prompts], way.pad)
        ends = RowEnds()
        check: FiniteCheck | None = FiniteCheck(len(prompts))
        if way.config.remove_invalid_values:  # transformers replaces such values
            check = None
        impossible = PromptFlags(len(prompts))
        draws = [self._draw(prompt) for prompt in prompts]
        options: dict[str, Any] = {}
        preparing = ExitStack()
        if way.is_one_by_one:
            longest = ids.shape[1] if self._pads_left else 0
            starts = [max(longest - len(prompt.ids), 0) for prompt in prompts]
            options["custom_generate"] = Decoder(
                draws,
                starts,
                ends,
                tick,
                impossible,
                self._steps,
                watch,
                preparing.close,
                check,
                chunk_tokens,
                leave,
            )
            preparing.enter_context(knowing_constants())
        else:
            torch.manual_seed(row_seed(*draws[0], 0))
            options["logits_processor"] = LogitsProcessorList([check] if check else [])
        with preparing:
            found = self._model.generate(
                known_to(ids, self._device),
                attention_mask=known_to(mask, self._device),
                generation_config=way.config,
                stopping_criteria=criteria,
                **options,
            )
        flags = {impossible: _IMPOSSIBLE}
        if check is not None:
            flags[check.bad] = _NOT_FINITE
        for each in flags:
            each.store()

        def note(found: torch.Tensor) -> None:
            if way.is_one_by_one:
                ends.note()
                all_ends = ends
            else:
                start = ids.shape[1] if self._pads_left else 1
                all_ends = ends_of(found, start, way, criteria)
                tick(sum(all_ends.lengths.values()))
            self._note(prompts, found, all_ends, way)
            for each, why in flags.items():
                for number in each.prompts():
                    prompts[number].fail(why)

        return Finding([HostCopy(found)], note)

    def _note(
        self,
        prompts: Sequence[Prompt],
        found: torch.Tensor,
        ends: RowEnds,
        way: DecodingOptions,
    ) -> None:
        """Sets the results of `prompts`, whose ids are `found` [sequences, tokens]."""
        each = len(found) // len(prompts)
        for number, prompt in enumerate(prompts):
            rows = range(number * each, (number + 1) * each)
            try:
                results = [self._result(found[row], row, ends, way) for row in rows]
            except Exception as error:  # a tokenizer's
                prompt.fail(f"the model failed: {type(error).__name__}: {error}")
            else:
                prompt.result = {"id": prompt.identity, **_joined(results)}

    def _criteria_of(self, way: DecodingOptions) -> StoppingCriteriaList:
        """The stopping criteria. Those of rows are not kept, since each row may have
        others."""
        if way.stop == self.way.stop:
            return self._criteria
        return criteria_of(self.tokenizer, way.stop)

    def _way(
        self, sampling: RowSampling, note: Callable[[str], None]
    ) -> DecodingOptions:
        limit, stop = sampling.max_new_tokens, sampling.stop
        return way_of(
            self._default,
            self.tokenizer,
            self._limits,
            max_new_tokens=self._max_new_tokens if limit is None else limit,
            stop=self._stop if stop is None else stop,
            options={**self._options, **dict(sampling.options)},
            note=note,
        )

    def _draw(self, prompt: Prompt) -> tuple[int, int]:
        """(seed, number) of a row, which determine its random state."""
        if prompt.seed is not None:
            return prompt.seed, 0
        return self._seed, prompt.index

    def _padded(
        self, prompts: Sequence[tuple[int, ...]], pad: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        longest = max(map(len, prompts))
        ids = torch.full((len(prompts), longest), pad, dtype=torch.int64)
        mask = torch.zeros_like(ids)
        for row, prompt in enumerate(prompts):
            start = longest - len(prompt) if self._pads_left else 0
            ids[row, start : start + len(prompt)] = torch.tensor(prompt)
            mask[row, start : start + len(prompt)] = 1
        return ids, mask

    def _result(
        self, ids: torch.Tensor, row: int, ends: RowEnds, way: DecodingOptions
    ) -> dict[str, Any]:
        length = ends.lengths[row]
        new = ids[ends.start : ends.start + length].tolist()
        text = self.tokenizer.decode(new, skip_special_tokens=True)
        cuts = [at for stop in way.stop if (at := text.find(stop)) >= 0]
        is_stopped = row in ends.stopped or bool(cuts)
        return {
            "completion": text[: min(cuts)] if cuts else text,
            "tokens": length,
            "finish_reason": "stop" if is_stopped else "length",
        }


def _joined(results: list[dict[str, Any]]) -> dict[str, Any]:
    """The result of one row: `results[0]`, or lists if several completions were asked
    for."""
    if len(results) == 1:
        return results[0]
    return {
        "completions": [result["completion"] for result in results],
        "tokens": [result["tokens"] for result in results],
        "finish_reasons": [result["finish_reason"] for result in results],
    }

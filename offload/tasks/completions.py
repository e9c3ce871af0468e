"""One micro-batch of prompts through transformers' `generate`, and back to text."""

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import StoppingCriteriaList, StopStringCriteria

from ...io.errors import UsageError
from ..model import engine_of
from .decoding import Decoder, RowEnds, row_seed


@dataclass(slots=True)
class Prompt:
    """A row on its way."""

    index: int
    identity: Any
    ids: tuple[int, ...] = ()
    result: dict[str, Any] | None = None

    def fail(self, message: str) -> None:
        self.result = {"id": self.identity, "error": message}


class Completions:
    """Completes micro-batches, all by the same options. Raises UsageError for those
    that transformers does not know."""

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        *,
        max_new_tokens: int,
        stop: tuple[str, ...],
        seed: int,
        options: Mapping[str, Any],
    ) -> None:
        self.tokenizer = tokenizer
        self.max_new_tokens = max_new_tokens
        self._model = model
        self._device = engine_of(model).device
        self._stop = stop
        self._seed = seed
        self._pads_left = not model.config.is_encoder_decoder
        self._config = _configured(
            model.generation_config,
            {**options, "max_new_tokens": max_new_tokens, "max_length": None},
        )
        ends = self._config.eos_token_id
        if ends is None:
            ends = tokenizer.eos_token_id
        self._ends = {ends} if isinstance(ends, int) else set(ends or ())
        pad = self._config.pad_token_id
        pad = tokenizer.pad_token_id if pad is None else pad
        self._pad = pad if pad is not None else min(self._ends, default=0)
        self._config.pad_token_id = self._pad
        if self._ends:
            self._config.eos_token_id = sorted(self._ends)
        self._criteria = StoppingCriteriaList()
        if stop:
            self._criteria.append(StopStringCriteria(tokenizer, list(stop)))

    @property
    def num_beams(self) -> int:
        """Sequences that each row goes on with."""
        return int(self._config.num_beams or 1)

    @property
    def is_one_by_one(self) -> bool:
        """Whether tokens are picked one after the other, row by row: no beams, no
        assistant."""
        return self._config.get_generation_mode().value in (
            "greedy_search",
            "sample",
        )

    def run(
        self,
        prompts: Sequence[Prompt],
        tick: Callable[[int], None],
        *,
        chunk_tokens: int | None = None,
        leave: Callable[[int], None] | None = None,
    ) -> None:
        """Fills `result` of each; `tick(rows)` is called as rows get a token. For
        `chunk_tokens` and `leave` see Decoder."""
        ids, mask = self._padded([prompt.ids for prompt in prompts])
        ends = RowEnds()
        options: dict[str, Any] = {}
        if self.is_one_by_one:
            numbers = [prompt.index for prompt in prompts]
            options["custom_generate"] = Decoder(
                self._seed, numbers, ends, tick, chunk_tokens, leave
            )
        else:  # what is drawn depends on these rows, not on how many came before
            torch.manual_seed(row_seed(self._seed, prompts[0].index, 0))
        found = self._model.generate(
            ids.to(self._device),
            attention_mask=mask.to(self._device),
            generation_config=self._config,
            stopping_criteria=self._criteria,
            **options,
        )
        if not self.is_one_by_one:
            ends = self._ends_of(found, 1 if not self._pads_left else ids.shape[1])
            tick(sum(ends.lengths.values()))
        each = len(found) // len(prompts)
        for number, prompt in enumerate(prompts):
            rows = range(number * each, (number + 1) * each)
            results = [self._result(found[row], row, ends) for row in rows]
            prompt.result = {"id": prompt.identity, **_joined(results)}

    def _padded(
        self, prompts: Sequence[tuple[int, ...]]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        longest = max(map(len, prompts))
        ids = torch.full((len(prompts), longest), self._pad, dtype=torch.int64)
        mask = torch.zeros_like(ids)
        for row, prompt in enumerate(prompts):
            start = longest - len(prompt) if self._pads_left else 0
            ids[row, start : start + len(prompt)] = torch.tensor(prompt)
            mask[row, start : start + len(prompt)] = 1
        return ids, mask

    def _ends_of(self, found: torch.Tensor, start: int) -> RowEnds:
        """Of rows that were not watched: up to the first end of text."""
        ends = RowEnds(start)
        for row, ids in enumerate(found[:, start:].tolist()):
            length = next((i + 1 for i, t in enumerate(ids) if t in self._ends), None)
            ends.lengths[row] = len(ids) if length is None else length
            if length is not None or len(ids) < self.max_new_tokens:
                ends.stopped.add(row)
        return ends

    def _result(self, ids: torch.Tensor, row: int, ends: RowEnds) -> dict[str, Any]:
        length = ends.lengths[row]
        new = ids[ends.start : ends.start + length].tolist()
        text = self.tokenizer.decode(new, skip_special_tokens=True)
        cuts = [at for stop in self._stop if (at := text.find(stop)) >= 0]
        is_stopped = row in ends.stopped or bool(cuts)
        return {
            "completion": text[: min(cuts)] if cuts else text,
            "tokens": length,
            "finish_reason": "stop" if is_stopped else "length",
        }


def _configured(default: Any, options: Mapping[str, Any]) -> Any:
    """The model's generation config with `options` on top. A temperature of 0 is
    greedy; another one, or a bound on what is drawn, is sampled."""
    values = dict(options)
    if values.get("temperature") == 0:
        values.pop("temperature")
        values["do_sample"] = False
    elif values.keys() & {"temperature", "top_k", "top_p", "min_p"}:
        values.setdefault("do_sample", True)
    config = copy.deepcopy(default)
    unknown = [key for key in values if not hasattr(config, key)]
    if unknown:
        raise UsageError(
            f"transformers' generate has no option {unknown[0]!r}: see "
            "transformers.GenerationConfig for those it has"
        )
    try:
        config.update(**values)
        config.validate()
    except ValueError as error:
        raise UsageError(f"these options do not go together: {error}") from error
    return config


def _joined(results: list[dict[str, Any]]) -> dict[str, Any]:
    """One row's completions: itself, or lists where several were asked for."""
    if len(results) == 1:
        return results[0]
    return {
        "completions": [result["completion"] for result in results],
        "tokens": [result["tokens"] for result in results],
        "finish_reasons": [result["finish_reason"] for result in results],
    }

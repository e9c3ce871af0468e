"""Checks the numbers among the options of transformers' `generate`. Pure."""

import math
from collections.abc import Iterator, Mapping
from typing import Any

from ...io.errors import UsageError

_TINY = 1e-30
_MOST = 1e30
_LONGEST = 1 << 31
_MOST_AT_ONCE = 10_000
"""transformers makes this many lists."""
_Range = tuple[type, float, float]

_ALWAYS: Mapping[str, _Range] = {
    "num_beams": (int, 1, _LONGEST),
    "num_return_sequences": (int, 1, _LONGEST),
    "no_repeat_ngram_size": (int, 0, _LONGEST),
    "encoder_no_repeat_ngram_size": (int, 0, _MOST_AT_ONCE),
    "min_new_tokens": (int, 0, _LONGEST),
    "min_length": (int, 0, _LONGEST),
    "prompt_lookup_num_tokens": (int, 1, _LONGEST),
    "prefill_chunk_size": (int, 1, _LONGEST),
    "repetition_penalty": (float, _TINY, _MOST),
    "encoder_repetition_penalty": (float, _TINY, _MOST),
    "length_penalty": (float, -_MOST, _MOST),
    "guidance_scale": (float, -_MOST, _MOST),
    "penalty_alpha": (float, -_MOST, _MOST),
}
_SAMPLED: Mapping[str, _Range] = {
    "temperature": (float, 0, _MOST),
    "top_k": (int, 0, _LONGEST),
    "top_p": (float, 0, _MOST),
    "min_p": (float, 0, 1),
    "top_h": (float, _TINY, 1),
    "typical_p": (float, _TINY, _MOST),
    "epsilon_cutoff": (float, 0, _MOST),
    "eta_cutoff": (float, 0, _MOST),
}
"""Options of sampling. Without sampling, they only need to be numbers."""


def set_numbers(config: Any) -> None:
    """Converts the options of `config`, a GenerationConfig, to int or float, as
    transformers expects.

    Raises UsageError for values that would fail with every row.
    """
    for key, (kind, least, most) in _ranges(config):
        value = getattr(config, key, None)
        if value is None:
            continue
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
        is_fine = is_number and math.isfinite(value) and least <= value <= most
        if not is_fine or (kind is int and value != int(value)):
            whole = "whole " if kind is int else ""
            raise UsageError(
                f"{key} is {value!r:.80}: it must be a {whole}number from {least:g} "
                f"to {most:g}; set it in the call, or mend the model's "
                "generation_config.json"
            )
        setattr(config, key, kind(value))


def _ranges(config: Any) -> Iterator[tuple[str, _Range]]:
    yield from _ALWAYS.items()
    for key, (kind, least, most) in _SAMPLED.items():
        yield key, (kind, least, most) if config.do_sample else (kind, -_MOST, _MOST)

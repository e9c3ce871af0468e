"""Reads how a row asks to be completed: `{"prompt", "temperature": 0.7}`. Pure."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from ..files.json_rows import is_encodable
from ..rows.row_error import RowError


@dataclass(frozen=True, slots=True)
class RowSampling:
    """The options that a row sets. Rows with equal options can share a micro-batch."""

    options: tuple[tuple[str, Any], ...] = ()
    """(name, value) of options of transformers' `generate`, sorted by name."""
    max_new_tokens: int | None = None
    stop: tuple[str, ...] | None = None


_LIMITS = ("max_tokens", "max_new_tokens", "max_completion_tokens")
_NUMBERS: Mapping[str, tuple[Callable[[float], bool], str]] = {
    "temperature": (lambda value: value >= 0, "a number from 0 on"),
    "top_p": (lambda value: 0 < value <= 1, "a number over 0, to 1"),
    "min_p": (lambda value: 0 <= value <= 1, "a number from 0 to 1"),
    "repetition_penalty": (lambda value: value > 0, "a number over 0"),
    "top_k": (lambda value: value >= 0, "a whole number from 0 on"),
    "n": (lambda value: value >= 1, "a whole number from 1 on"),
}
"""By key: which numbers are allowed, as a test and in words."""
_WHOLE = ("top_k", "n")
NUMBERS = frozenset(_NUMBERS) - {"n"}
"""Keys that are options of transformers' `generate` with the same name."""


def number_of(key: str, value: Any) -> float:
    """The number `value` of `key`, as transformers expects it: an int for counts, else
    a float.

    Raises ValueError, which names key and value.
    """
    is_fine, words = _NUMBERS[key]
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not is_number or not math.isfinite(value) or not is_fine(value):
        raise ValueError(f'"{key}" is {value!r:.80}, not {words}')
    if key in _WHOLE:
        if value != int(value):
            raise ValueError(f'"{key}" is {value!r}, not {words}')
        return int(value)
    return float(value)


def row_sampling(row: Mapping[str, Any]) -> RowSampling:
    """The options that `row` sets. Raises RowError, which names the key."""
    options = {}
    for key in _NUMBERS:
        if row.get(key) is not None:
            name = "num_return_sequences" if key == "n" else key
            try:
                options[name] = number_of(key, row[key])
            except ValueError as error:
                raise RowError(f"the row's {error}") from error
    return RowSampling(tuple(sorted(options.items())), _limit(row), _stop(row))


def row_seed_of(row: Mapping[str, Any]) -> int | None:
    """The row's own seed; None if it has none. Raises RowError if it is not a whole
    number."""
    seed = row.get("seed")
    if seed is None or (isinstance(seed, int) and not isinstance(seed, bool)):
        return seed
    raise RowError(f'the row\'s "seed" is {seed!r}, not a whole number')


def _limit(row: Mapping[str, Any]) -> int | None:
    given = {key: row[key] for key in _LIMITS if row.get(key) is not None}
    for key, value in given.items():
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise RowError(
                f'the row\'s "{key}" is {value!r:.80}, not a whole number from 1 on'
            )
    if len(set(given.values())) > 1:
        raise RowError(f"the row has several limits that differ: {given}")
    return next(iter(given.values()), None)


def _stop(row: Mapping[str, Any]) -> tuple[str, ...] | None:
    stop = row.get("stop")
    if stop is None:
        return None
    found = [stop] if isinstance(stop, str) else stop
    if not isinstance(found, (list, tuple)) or not all(
        isinstance(each, str) and each and is_encodable(each) for each in found
    ):
        raise RowError(f'the row\'s "stop" is {stop!r:.80}: a text, or a list of texts')
    return tuple(found)

"""Turns a prompt and its labels into tokens: a common beginning, and an end for each
label."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .row_error import RowError
from .text import check_row, text_of, tokenize


@dataclass(frozen=True, slots=True)
class Label:
    """One label as a continuation of the prompt."""

    text: str
    ids: tuple[int, ...]
    """Its tokens after the common beginning of all labels."""
    first: int
    """The index of the label's first token in `ids`. The tokens before it belong to the
    prompt, but are not the same for all labels."""


@dataclass(frozen=True, slots=True)
class Labelled:
    """A prompt with its labels. `prompt` is the common beginning of all; it and the end
    of each label have at least one token."""

    prompt: tuple[int, ...]
    labels: tuple[Label, ...]


def tokenize_labels(
    tokenizer: Any, row: Mapping[str, Any], labels: Sequence[str]
) -> Labelled:
    """The tokens of a row. Each label has the same tokens as the completion that
    `penstock score` would score.

    Raises RowError for a row without prompt or labels.
    """
    check_row(row)
    names = row.get("labels") or labels
    if not isinstance(names, (list, tuple)) or len(names) < 2:
        raise RowError(f'the row\'s "labels" are {names!r}: it needs two or more')
    if not all(isinstance(name, str) for name in names) or len(set(names)) < len(names):
        raise RowError(
            f'the row\'s "labels" are {names!r}: different strings are needed'
        )
    prompt = text_of(row, "prompt" if "prompt" in row else "text")
    each = [
        tokenize(tokenizer, {"prompt": prompt, "completion": name}) for name in names
    ]
    shared = _shared([tokens.ids[: tokens.first] for tokens in each])
    if not shared:
        raise RowError("the prompt's first token is not the same for all labels")
    return Labelled(
        each[0].ids[:shared],
        tuple(
            Label(name, tokens.ids[shared:], tokens.first - shared)
            for name, tokens in zip(names, each, strict=True)
        ),
    )


def _shared(rows: Sequence[tuple[int, ...]]) -> int:
    """How many ids at the beginning are the same in all `rows`."""
    columns = zip(*rows, strict=False)
    return next(
        (at for at, ids in enumerate(columns) if len(set(ids)) > 1), min(map(len, rows))
    )

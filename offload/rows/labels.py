"""A prompt and its labels as tokens: what they have in common, and each one's own."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .text import RowError, check_row, text_of, tokenize


@dataclass(frozen=True, slots=True)
class Label:
    """One way to go on from a prompt."""

    text: str
    ids: tuple[int, ...]
    """Its tokens behind what all labels have in common."""
    first: int
    """The first of `ids` that is the label's; those before are the prompt's, but not
    alike for all labels."""


@dataclass(frozen=True, slots=True)
class Labelled:
    """`prompt` is what all labels have in common: at least a token, as each has of its
    own."""

    prompt: tuple[int, ...]
    labels: tuple[Label, ...]


def tokenize_labels(
    tokenizer: Any, row: Mapping[str, Any], labels: Sequence[str]
) -> Labelled:
    """The tokens of a row, each label's those of the completion that `penstock score`
    would score. Raises RowError for a row without prompt or labels."""
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
    """How many ids all of `rows` begin with alike."""
    columns = zip(*rows, strict=False)
    return next(
        (at for at, ids in enumerate(columns) if len(set(ids)) > 1), min(map(len, rows))
    )

"""Remembers where the values of a policy were written, so that errors can point there.
Pure."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from ...io.errors import PolicyError

KeyPath = tuple[str, ...]
"""The keys that lead to a value, the outermost first: `("io", "threads")`."""


class Mark(NamedTuple):
    """A position in a file (lines and columns from 1), or a setting as it was given."""

    source: str
    line: int | None = None
    column: int | None = None

    def __str__(self) -> str:
        parts = (part for part in self if part is not None)
        return ":".join(str(part) for part in parts)


class Entry(NamedTuple):
    """Where a key was written, and where its value begins."""

    key: Mark
    value: Mark


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing that is wrong: a sentence, and the keys that it is about."""

    message: str
    keys: tuple[KeyPath, ...] = ()
    is_key: bool = False
    """Whether the key itself is wrong, not its value."""


@dataclass(frozen=True, slots=True)
class Origin:
    """Where the keys of a policy were written.

    All origins are equal: policies with the same values are equal, wherever they were
    written.
    """

    entries: Mapping[KeyPath, Entry] = field(default_factory=dict, compare=False)

    def place(self, problem: Problem) -> str:
        """The sentence of `problem`, with the positions that it is about before it."""
        found = (self._find(key, problem.is_key) for key in problem.keys)
        places = dict.fromkeys(str(mark) for mark in found if mark is not None)
        where = " and ".join(places)
        return f"{where}: {problem.message}" if where else problem.message

    def _find(self, key: KeyPath, is_key: bool) -> Mark | None:
        """The position of `key`, or of the nearest key above it that was written."""
        for length in range(len(key), 0, -1):
            entry = self.entries.get(key[:length])
            if entry is not None:
                return entry.key if is_key or length < len(key) else entry.value
        return None


class PolicyProblems(PolicyError):
    """All problems of one policy, one sentence each."""

    def __init__(
        self, problems: Iterable[Problem], origin: Origin | None = None
    ) -> None:
        self.problems = tuple(problems)
        where = origin or Origin()
        super().__init__(*(where.place(problem) for problem in self.problems))

    def __reduce__(self) -> tuple[Any, ...]:
        return PolicyError, self.args

    def at(self, origin: Origin) -> "PolicyProblems":
        """The same problems, with the positions where their keys were written."""
        return type(self)(self.problems, origin)


class Document(NamedTuple):
    """The values of a policy file, and where each was written."""

    values: dict[str, Any]
    entries: dict[KeyPath, Entry]


def merge(base: Document, over: Document) -> Document:
    """Merges two documents; `over` wins.

    Mappings are merged, with the keys of `over` first, since of several rules the first
    that matches applies. null removes a value of `base`.
    """
    entries = dict(base.entries)
    values = _merge(base.values, over.values, (), entries)
    return Document(values, {**entries, **over.entries})


def _merge(
    base: dict[str, Any],
    over: dict[str, Any],
    path: KeyPath,
    entries: dict[KeyPath, Entry],
) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in over.items():
        here, old = (*path, str(key)), base.get(key)
        if isinstance(value, dict) and isinstance(old, dict):
            found[key] = _merge(old, value, here, entries)
            continue
        if key in base:  # forget the positions below it
            for other in [e for e in entries if e[: len(here)] == here]:
                del entries[other]
        if value is not None or key not in base:
            found[key] = value
    rest = {key: value for key, value in base.items() if key not in over}
    return found | rest

"""Where the values of a policy stand in its files, so that what is wrong with one can
be pointed at. Pure."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from ...io.errors import PolicyError

KeyPath = tuple[str, ...]
"""The keys that lead to a value, outermost first: `("io", "threads")`."""


class Mark(NamedTuple):
    """A place in a file (lines and columns from 1), or a setting as it was given."""

    source: str
    line: int | None = None
    column: int | None = None

    def __str__(self) -> str:
        parts = (part for part in self if part is not None)
        return ":".join(str(part) for part in parts)


class Entry(NamedTuple):
    """Where a key stands, and where its value begins."""

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
    """Where keys were written. All are equal: a policy is what it asks for, wherever
    that was written."""

    entries: Mapping[KeyPath, Entry] = field(default_factory=dict, compare=False)

    def place(self, problem: Problem) -> str:
        """`problem` as a sentence, with the places that it is about before it."""
        found = (self._find(key, problem.is_key) for key in problem.keys)
        places = dict.fromkeys(str(mark) for mark in found if mark is not None)
        where = " and ".join(places)
        return f"{where}: {problem.message}" if where else problem.message

    def _find(self, key: KeyPath, is_key: bool) -> Mark | None:
        """Of `key`, or of the nearest one above it that was written."""
        for length in range(len(key), 0, -1):
            entry = self.entries.get(key[:length])
            if entry is not None:
                return entry.key if is_key or length < len(key) else entry.value
        return None


class PolicyProblems(PolicyError):
    """Everything that is wrong with one policy, a sentence each."""

    def __init__(
        self, problems: Iterable[Problem], origin: Origin | None = None
    ) -> None:
        self.problems = tuple(problems)
        where = origin or Origin()
        super().__init__(*(where.place(problem) for problem in self.problems))

    def __reduce__(self) -> tuple[Any, ...]:
        return PolicyError, self.args

    def at(self, origin: Origin) -> "PolicyProblems":
        """The same, with the places where the keys were written."""
        return type(self)(self.problems, origin)


class Document(NamedTuple):
    """What was written: values, and where each of them stands."""

    values: dict[str, Any]
    entries: dict[KeyPath, Entry]


def merge(base: Document, over: Document) -> Document:
    """Both, where `over` wins. Mappings are merged, `over`'s keys first (of rules, the
    first that matches counts); null takes out what `base` has."""
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
        if key in base:  # what stood below it is gone
            for other in [e for e in entries if e[: len(here)] == here]:
                del entries[other]
        if value is not None or key not in base:
            found[key] = value
    rest = {key: value for key, value in base.items() if key not in over}
    return found | rest

"""Counters that say themselves how those of several sources become one.

A counter is a field of a frozen dataclass. Its rule stands in the field's metadata, so
that a counter is named where it is counted and nowhere else. A field that is a
dataclass itself is merged field by field; any other one is as in the first source.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import field, fields, is_dataclass, replace
from enum import Enum, auto
from itertools import chain
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from _typeshed import DataclassInstance


class Rule(Enum):
    """How the values of several sources become one."""

    SUM = auto()
    """Numbers are added; mappings are added key by key."""
    MOST = auto()
    """The largest value."""
    MEAN = auto()
    """The sum, divided by the number of workers that ran at the same time."""
    ALIVE = auto()
    """The sum over the workers that came to the end: memory, which is given back."""
    EACH = auto()
    """Every entry of the tuples, once, in their order."""


_KEY = "penstock.merge"
Counters = TypeVar("Counters", bound="DataclassInstance")


def counter(rule: Rule, default: Any = 0) -> Any:
    """A field that is merged by `rule`.

    A type as `default` is called for each instance.
    """
    if isinstance(default, type):
        return field(default_factory=default, metadata={_KEY: rule})
    return field(default=default, metadata={_KEY: rule})


def merged(found: Sequence[Counters], num_workers: int = 1) -> Counters:
    """The counters of all `found` (at least one) as one.

    The last `num_workers` of them ran at the same time and came to the end; those
    before them did not.
    """
    changed = {}
    for each in fields(found[0]):
        values = [getattr(one, each.name) for one in found]
        if _KEY in each.metadata:
            changed[each.name] = _merge(each.metadata[_KEY], values, num_workers)
        elif is_dataclass(values[0]):
            changed[each.name] = merged(values, num_workers)
    return replace(found[0], **changed)


def counters_of(one: "DataclassInstance") -> dict[str, Any]:
    """The fields of `one` by their names, for a dataclass that has them, too."""
    return {each.name: getattr(one, each.name) for each in fields(one)}


def _merge(rule: Rule, values: Sequence[Any], num_workers: int) -> Any:
    match rule:
        case Rule.SUM:
            return _sum(values)
        case Rule.MOST:
            return max(values)
        case Rule.MEAN:
            return _sum(values) / num_workers
        case Rule.ALIVE:
            return _sum(values[-num_workers:])
        case Rule.EACH:
            return tuple(dict.fromkeys(chain.from_iterable(values)))


def _sum(values: Sequence[Any]) -> Any:
    if not isinstance(values[0], Mapping):
        return sum(values)
    total: Counter[str] = Counter()
    for value in values:
        total.update(value)
    return dict(total)

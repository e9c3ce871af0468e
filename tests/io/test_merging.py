"""Counters of several sources become one, each by its own rule."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields

import pytest

from penstock.io.kv.count import KvStatistics
from penstock.io.merging import Rule, counter, counters_of, merged
from penstock.offload.engine.counters import Statistics


@dataclass(frozen=True, kw_only=True)
class Inner:
    times: float = counter(Rule.MEAN, 0.0)


@dataclass(frozen=True, kw_only=True)
class Counts:
    name: str
    num: int = counter(Rule.SUM)
    by_tier: Mapping[str, int] = counter(Rule.SUM, dict)
    most: int = counter(Rule.MOST)
    seconds: float = counter(Rule.MEAN, 0.0)
    memory: int = counter(Rule.ALIVE)
    notes: tuple[str, ...] = counter(Rule.EACH, ())
    inner: Inner = field(default_factory=Inner)


def counts(**values: object) -> Counts:
    return Counts(name="a", **values)  # type: ignore[arg-type]


FOUND = [
    counts(num=1, by_tier={"disk": 5}, most=9, seconds=3.0, memory=100, notes=("x",)),
    counts(num=2, by_tier={"host": 1}, most=4, seconds=1.0, memory=10),
    Counts(
        name="b",
        num=4,
        by_tier={"disk": 2},
        seconds=2.0,
        memory=1,
        notes=("y", "x"),
        inner=Inner(times=8.0),
    ),
]


def test_each_counter_by_its_rule() -> None:
    assert merged(FOUND, num_workers=2) == Counts(
        name="a",
        num=7,
        by_tier={"disk": 7, "host": 1},
        most=9,
        seconds=3.0,
        memory=11,
        notes=("x", "y"),
        inner=Inner(times=4.0),
    )


def test_one_alone_is_itself() -> None:
    assert merged(FOUND[:1]) == FOUND[0]


def test_the_fields_of_another_dataclass() -> None:
    assert counters_of(Inner(times=2.0)) == {"times": 2.0}


@pytest.mark.parametrize("kind", [Statistics, KvStatistics])
def test_what_is_not_merged_is_a_fact_of_the_model(kind: type) -> None:
    facts = {each.name for each in fields(kind) if not each.metadata}
    of_model = {"model_bytes", "budget", "bytes_by_tier", "codecs", "reader"}
    allowed = {*of_model, "kv", "ranks"}
    assert facts <= allowed

"""Advice is tried by the plan before it is given."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

from penstock.offload.reports.advice import with_tried_advice
from penstock.offload.reports.counts import Advice, Bound

GIB = 1 << 30


@dataclass
class Plans:
    """A plan of what has room: tokens in flight, and float32 beside a working set."""

    most_in_flight: int = 4096
    float32_bytes: int | None = GIB
    rates: Mapping[str, float] | None = None
    now: int = 1024

    def __call__(self, settings: Mapping[str, Any]) -> Any:
        tokens = settings.get("tokens_in_flight", self.now)
        dtype = settings.get("dtype", "bfloat16")
        size: Any = settings.get("device_memory", 1)
        if dtype == "float32" and self.float32_bytes is None:
            return None
        if dtype == "float32" and size != "auto" and size < (self.float32_bytes or 0):
            return None
        if tokens > self.most_in_flight or settings.get("host_memory") == "9GiB":
            return None
        rate = (self.rates or {"bfloat16": 5.0, "float32": 25.0})[dtype]
        size = self.float32_bytes if size == "auto" else size
        policy = SimpleNamespace(tokens_in_flight=tokens, device_memory=size)
        return SimpleNamespace(rate=rate, policy=policy)


def settings_of(plans: Plans, *advice: Advice) -> list[str | None]:
    found = with_tried_advice(Bound("compute", 1.0, "why", advice), plans)
    return [one.setting for one in found.advice]


FASTER = Advice("dtype: float32", "no instructions.")


def test_what_fits_and_what_is_no_setting_is_given_as_it_is() -> None:
    words = Advice(None, "only a faster device helps.")
    more = Advice("tokens_in_flight: 2048", "hides it.")
    assert settings_of(Plans(), words, more) == [None, "tokens_in_flight: 2048"]


def test_what_does_not_fit_is_not_given() -> None:
    host = Advice("host_memory: 9GiB", "stay.")
    assert settings_of(Plans(), host) == []
    assert settings_of(Plans(float32_bytes=None), FASTER) == []


def test_fewer_in_flight_are_advised_where_only_fewer_fit() -> None:
    more = Advice("tokens_in_flight: 16384", "hides it.")
    assert settings_of(Plans(), more) == ["tokens_in_flight: 4096"]
    assert settings_of(Plans(now=4096), more) == [], "no more than there are"


def test_a_faster_dtype_comes_with_the_working_set_that_it_needs() -> None:
    found = with_tried_advice(Bound("compute", 1.0, "why", (FASTER,)), Plans())
    (advice,) = found.advice
    assert advice.setting == "{dtype: float32, device_memory: 1GiB}"
    assert advice.effect.startswith("5.0x as fast, by the plan: ")
    assert settings_of(Plans(float32_bytes=1), FASTER) == ["dtype: float32"]


def test_a_dtype_that_is_no_faster_by_the_plan_is_not_advised() -> None:
    slower = Plans(float32_bytes=1, rates={"bfloat16": 5.0, "float32": 4.0})
    assert settings_of(slower, FASTER) == []


def test_without_a_plan_advice_is_given_as_it_is() -> None:
    bound = Bound("compute", 1.0, "why", (FASTER,))
    assert with_tried_advice(bound, None) == bound

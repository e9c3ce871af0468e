"""Which tier keeps the keys and values that come."""

from __future__ import annotations

import pytest

from penstock.io.errors import DoesNotFitError
from penstock.scheduler.kv.budget import KvBudget


def test_what_has_no_room_goes_to_the_next_slower_tier() -> None:
    budget = KvBudget(("device", "host"), {"device": 10, "host": 20})
    need = {"device": 6, "host": 8}
    assert [budget.take(need) for _ in range(3)] == ["device", "host", "host"]
    with pytest.raises(DoesNotFitError, match=r"8 bytes in host, where 16 of 20"):
        budget.take(need)
    assert budget.held == {"device": 6, "host": 16}


def test_what_is_given_back_is_taken_again_and_the_peak_stays() -> None:
    budget = KvBudget(("host",), {"host": 10})
    budget.take({"host": 10})
    budget.give_back("host", 10)
    assert budget.take({"host": 4}) == "host"
    assert budget.held == {"host": 4}
    assert budget.peak == {"host": 10}


def test_growing_takes_only_what_is_new() -> None:
    budget = KvBudget(("host",), {"host": 10})
    budget.take({"host": 6})
    budget.resize("host", 6, 10)
    with pytest.raises(DoesNotFitError, match=r"kv\.limits\.host"):
        budget.resize("host", 10, 11)
    assert budget.held == {"host": 10}

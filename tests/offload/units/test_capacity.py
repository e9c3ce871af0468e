"""The least device_memory that a refusal names."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest

from penstock.offload.units.capacity import least_capacity

PAGE = 4096


def dividing(needs: Mapping[int, int]) -> Any:
    """Divides a model that needs so many bytes with budgets from so many bytes on."""

    class Division:
        def __init__(self, capacity: int) -> None:
            self.least = max(least for least in needs if least <= capacity)

        def needs(self) -> tuple[int, list[int]]:
            return 0, [needs[self.least]]

    return Division


@pytest.mark.parametrize(
    ("needs", "asked", "least"),
    [
        ({0: 3 * PAGE}, PAGE, 3 * PAGE),
        ({0: 3 * PAGE}, 5 * PAGE, 5 * PAGE),
        ({0: 3 * PAGE, 3 * PAGE: 4 * PAGE}, PAGE, 4 * PAGE),
        # divided too far, a smaller budget needs more
        ({0: 7 * PAGE, 4 * PAGE: 5 * PAGE}, PAGE, 5 * PAGE),
        ({0: 9 * PAGE, 2 * PAGE: 7 * PAGE, 5 * PAGE: 6 * PAGE}, PAGE, 6 * PAGE),
        ({0: 7 * PAGE, 6 * PAGE: 6 * PAGE, 7 * PAGE: 7 * PAGE}, PAGE, 6 * PAGE),
        # what is named is more than what was asked
        ({0: 7 * PAGE, 4 * PAGE: 4 * PAGE, 5 * PAGE: 9 * PAGE}, 5 * PAGE, 9 * PAGE),
        ({0: PAGE + 1}, 1, 2 * PAGE),
    ],
)
def test_the_least_budget_works_and_one_page_less_does_not(
    needs: Mapping[int, int], asked: int, least: int
) -> None:
    assert least_capacity(dividing(needs), asked, PAGE) == least

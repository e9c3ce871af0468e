"""Rows that never go back, and a time left that does not jump."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest

from penstock.offload.monitoring.progress import time_left
from penstock.offload.monitoring.samples import ResourceSample
from penstock.offload.monitoring.time_left import TimeLeft, estimated_seconds_left


def sample(
    seconds: float, rows: float, *, passes: int = 3, num_rows: int | None = 72
) -> ResourceSample:
    return ResourceSample(
        seconds=seconds,
        stage="scoring",
        stage_seconds=seconds,
        rows=rows,
        num_rows=num_rows,
        passes=passes,
        bytes_read={},
    )


def test_the_time_left_is_that_of_the_rows_left() -> None:
    assert estimated_seconds_left(sample(10.0, 18.0)) == pytest.approx(30.0)
    assert estimated_seconds_left(sample(10.0, 0.0)) is None
    assert estimated_seconds_left(sample(10.0, 5.0, num_rows=None)) is None
    assert estimated_seconds_left(sample(10.0, 80.0)) == 0.0


def test_the_first_pass_says_so_instead_of_a_number() -> None:
    seen = TimeLeft().follow(sample(0.5, 0.1, passes=1))
    assert seen.seconds_left is None
    assert time_left(seen) == "first pass"


def test_the_end_of_the_only_pass_is_the_end() -> None:
    assert TimeLeft().follow(sample(5.0, 72.0, passes=1)).seconds_left == 0.0


def test_rows_never_go_back_and_are_never_more_than_there_are() -> None:
    pace = TimeLeft()
    seen = [pace.follow(sample(i, rows)).rows for i, rows in enumerate((70, 49, 90))]
    assert seen == [70, 70, 72]


def test_the_time_left_does_not_jump_when_a_look_is_off() -> None:
    pace = TimeLeft()
    looks = [(float(second), float(second)) for second in range(20, 60)]
    looks[20] = (looks[20][0], 8.0)  # at the seam of two passes
    left = [pace.follow(sample(*look)).seconds_left for look in looks]
    numbers = [each for each in left if each is not None]
    assert len(numbers) == len(looks)
    assert all(after <= before for before, after in pairwise(numbers))


def test_a_job_that_slows_down_says_so_little_by_little() -> None:
    pace = TimeLeft()
    for second in range(20, 31):
        pace.follow(sample(float(second), float(second)))
    seen = [
        pace.follow(sample(float(second), 30 + (second - 30) / 10))
        for second in range(31, 120)
    ]
    numbers = [each.seconds_left or 0.0 for each in seen]
    assert numbers[-1] > numbers[0]
    assert all(after - before < 3.0 for before, after in pairwise(numbers))


def test_what_was_done_before_says_nothing_of_the_speed() -> None:
    resumed = replace(sample(10.0, 46.0), rows_before=40)
    assert estimated_seconds_left(resumed) == pytest.approx(10.0 * 26 / 6)

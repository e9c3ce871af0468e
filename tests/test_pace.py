"""A held link moves one thing after another at its speed, and each a little late."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from penstock.io.pace import Pace


def test_a_transfer_takes_its_bytes_over_the_bandwidth_and_the_latency() -> None:
    pace = Pace(bytes_per_second=100, latency_seconds=0.5)
    assert pace.end_of(200, 10.0) == 12.5


def test_back_to_back_each_waits_for_the_one_before_but_not_for_its_latency() -> None:
    pace = Pace(bytes_per_second=100, latency_seconds=0.5)
    assert [pace.end_of(100, 0.0) for _ in range(3)] == [1.5, 2.5, 3.5]
    assert pace.end_of(100, 2.0) == 4.5  # given while the third is on its way


def test_time_in_which_nothing_is_given_is_not_saved_up() -> None:
    pace = Pace(bytes_per_second=100, latency_seconds=0.0)
    assert pace.end_of(100, 0.0) == 1.0
    assert pace.end_of(100, 50.0) == 51.0
    assert pace.end_of(100, 50.0) == 52.0


def test_nothing_takes_only_the_latency() -> None:
    pace = Pace(bytes_per_second=100, latency_seconds=0.25)
    assert pace.end_of(0, 3.0) == 3.25


TIMES = st.lists(
    st.tuples(st.integers(0, 1000), st.integers(0, 30)), min_size=1, max_size=20
)


@given(TIMES, st.sampled_from([1, 2, 8, 64]), st.sampled_from([0.0, 0.5, 4.0]))
def test_no_stretch_of_time_moves_more_than_the_bandwidth(
    steps: list[tuple[int, int]], speed: int, latency: float
) -> None:
    """All values are powers of two apart: the sums are exact."""
    pace = Pace(bytes_per_second=speed, latency_seconds=latency)
    now, ends, sizes, given_at = 0.0, [], [], []
    for nbytes, later in steps:
        now += later
        ends.append(pace.end_of(nbytes, now))
        sizes.append(nbytes)
        given_at.append(now)
    for last in range(len(steps)):
        # It ends as soon as it can: with everything back to back since some start.
        assert ends[last] == latency + max(
            given_at[first] + sum(sizes[first : last + 1]) / speed
            for first in range(last + 1)
        )


def test_a_link_that_moves_nothing_is_a_mistake_of_ours() -> None:
    with pytest.raises(AssertionError, match="ends nothing"):
        Pace(bytes_per_second=0, latency_seconds=0.0)

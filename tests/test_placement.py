"""What stays is spread evenly, fits, and is as much as fits."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from penstock.scheduler.placement import spread

SIZES = st.lists(st.integers(1, 1000), max_size=40)


@given(sizes=SIZES, budget=st.integers(0, 20_000))
def test_what_stays_fits_and_nothing_more_would(sizes: list[int], budget: int) -> None:
    chosen = spread(sizes, budget)
    assert list(chosen) == sorted(set(chosen))
    left = budget - sum(sizes[unit] for unit in chosen)
    assert left >= 0
    others = [size for unit, size in enumerate(sizes) if unit not in chosen]
    assert all(size > left for size in others)


@given(num=st.integers(1, 60), stay=st.integers(0, 60), size=st.integers(1, 1 << 40))
def test_equal_units_are_spread_evenly(num: int, stay: int, size: int) -> None:
    stay = min(stay, num)
    chosen = spread([size] * num, stay * size)
    assert len(chosen) == stay
    for end in range(1, num + 1):
        so_far = sum(unit < end for unit in chosen)
        assert abs(so_far - stay * end / num) <= 1


def test_half_of_the_blocks_stay_in_turns() -> None:
    assert spread([10] * 8, 40) == (1, 3, 5, 7)
    assert spread([10] * 8, 0) == ()
    assert spread([10] * 8, 1000) == tuple(range(8))

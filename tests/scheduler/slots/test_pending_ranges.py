"""What to wait for before bytes are written again is remembered byte for byte."""

from __future__ import annotations

from collections import defaultdict

from hypothesis import given
from hypothesis import strategies as st

from penstock.scheduler.slots.pending_ranges import PendingRanges

SIZE = 24

RANGES = st.tuples(st.integers(0, SIZE - 1), st.integers(0, SIZE - 1)).map(
    lambda ends: (min(ends), max(ends) + 1)  # at least a byte, as a slot has
)
STEPS = st.lists(
    st.tuples(st.booleans(), RANGES, st.lists(st.integers(0, 6), max_size=3)),
    max_size=30,
)


@given(STEPS)
def test_the_marks_are_those_of_a_model_that_knows_every_byte(
    steps: list[tuple[bool, tuple[int, int], list[int]]],
) -> None:
    pending: PendingRanges[int] = PendingRanges()
    model: dict[int, set[int]] = defaultdict(set)
    for is_add, (start, end), marks in steps:
        if is_add:
            pending.add(start, end, marks)
            for byte in range(start, end):
                model[byte] |= set(marks)
            continue
        found = pending.take(start, end)
        assert len(found) == len(set(found)), "a mark is waited for twice"
        assert set(found) == set().union(
            *(model.pop(b, set()) for b in range(start, end))
        )
    for byte in range(SIZE):  # nothing else is left, and nothing is lost
        assert set(pending.take(byte, byte + 1)) == model[byte]
    assert pending.take(0, SIZE) == ()


@given(st.lists(RANGES, min_size=1, max_size=200))
def test_what_is_taken_before_it_is_added_to_stays_short(
    ranges: list[tuple[int, int]],
) -> None:
    """Like slots: claimed (take), read, and released (add), with two events each."""
    pending: PendingRanges[int] = PendingRanges()
    for turn, (start, end) in enumerate(ranges):
        pending.take(start, end)
        pending.add(start, end, (2 * turn, 2 * turn + 1))
        assert len(pending) <= 2 * SIZE


def test_what_is_left_of_a_range_lies_beside_what_was_taken() -> None:
    pending: PendingRanges[str] = PendingRanges()
    pending.add(0, 10, ["a"])
    assert pending.take(4, 6) == ("a",)
    assert pending.take(4, 6) == ()
    assert pending.take(3, 5) == ("a",)
    assert pending.take(0, 3) == ("a",)
    assert pending.take(0, 6) == ()
    assert pending.take(0, 10) == ("a",)
    assert len(pending) == 0


def test_neighbours_are_not_waited_for() -> None:
    pending: PendingRanges[str] = PendingRanges()
    pending.add(0, 4, ["a"])
    pending.add(8, 12, ["b"])
    assert pending.take(4, 8) == ()
    assert pending.take(3, 9) == ("a", "b")

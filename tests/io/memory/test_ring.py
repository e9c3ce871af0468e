"""A ring gives out bytes that nobody has, in order, and whenever there is room."""

from __future__ import annotations

from collections import deque

import pytest
from hypothesis import given
from hypothesis import strategies as st

from penstock.io.memory.ring import Ring


def expected(capacity: int, taken: deque[tuple[int, int]], nbytes: int) -> int | None:
    """Byte by byte: behind the newest piece, if need be from the front again, never
    into a piece that somebody has, never past the oldest one."""
    if not taken:
        return 0
    used = {byte for start, end in taken for byte in range(start, end)}
    newest_start, newest_end = taken[-1]
    starts = [newest_end]
    if newest_start >= taken[0][0]:  # it has not come round yet
        starts.append(0)
    for start in starts:
        piece = range(start, start + nbytes)
        if start + nbytes <= capacity and used.isdisjoint(piece):
            return start
    return None


@given(st.integers(1, 40), st.lists(st.tuples(st.booleans(), st.integers(1, 40))))
def test_a_ring_gives_what_a_model_of_it_gives(
    capacity: int, steps: list[tuple[bool, int]]
) -> None:
    ring = Ring(capacity)
    taken: deque[tuple[int, int]] = deque()
    for is_take, nbytes in steps:
        if is_take and nbytes <= capacity:
            start = ring.take(nbytes)
            assert start == expected(capacity, taken, nbytes)
            if start is None:
                assert taken, "there is always room in an empty ring"
                continue
            assert 0 <= start <= start + nbytes <= capacity
            for other, end in taken:
                assert start + nbytes <= other or end <= start, "two have these bytes"
            taken.append((start, start + nbytes))
        elif not is_take and taken:
            ring.give_back()
            taken.popleft()
        assert len(ring) == len(taken)
    while taken:
        ring.give_back()
        taken.popleft()
    assert ring.take(capacity) == 0


@given(st.integers(1, 60), st.data())
def test_pieces_of_at_most_a_third_always_find_room_for_two(
    third: int, data: st.DataObject
) -> None:
    """So that with `staging_memory: auto` one unit is read while one is copied."""
    ring = Ring(3 * third)
    assert ring.take(data.draw(st.integers(1, third))) is not None
    for _ in range(20):
        assert ring.take(data.draw(st.integers(1, third))) is not None
        ring.give_back()


def test_the_first_taken_is_the_first_given_back() -> None:
    ring = Ring(10)
    assert [ring.take(4), ring.take(4), ring.take(4)] == [0, 4, None]
    ring.give_back()  # 0 to 4
    assert ring.take(5) is None  # 4 at the front, 2 at the end: not in one piece
    assert ring.take(4) == 0
    assert ring.take(1) is None  # 8 to 10 is behind the newest's back
    ring.give_back()  # 4 to 8
    assert ring.take(6) == 4
    assert repr(ring) == "<Ring: 2 pieces, 10/10 bytes>"


@pytest.mark.parametrize("nbytes", [0, 11])
def test_what_can_never_fit_is_a_mistake_of_ours(nbytes: int) -> None:
    with pytest.raises(AssertionError, match="never fit into 10"):
        Ring(10).take(nbytes)

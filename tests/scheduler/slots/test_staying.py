"""Units that stay in the working set: in place, loaded once, never in another's way."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_working_set import WHENS, Checker, make, run_cyclically

from penstock.io.errors import DoesNotFitError, ReadError
from penstock.scheduler.slots.working_set import WorkingSet


def places_of(working_set: WorkingSet) -> dict[int, tuple[int, int]]:
    return {u: (slot.offset, slot.end) for u, slot in working_set._places.items()}


@given(st.data())
def test_in_any_shape_what_stays_is_loaded_once_and_never_moves(
    data: st.DataObject,
) -> None:
    sizes = data.draw(st.lists(st.integers(1, 12), min_size=1, max_size=10), "sizes")
    staying = data.draw(st.sets(st.integers(0, len(sizes) - 1)), "staying")
    streamed = [n for unit, n in enumerate(sizes) if unit not in staying]
    least = sum(sizes[unit] for unit in staying) + max(streamed, default=0)
    working_set, disk = make(
        sizes,
        least + data.draw(st.integers(0, 20), "spare"),
        when=data.draw(st.sampled_from(WHENS), "when"),
        seed=data.draw(st.integers(0, 99), "seed"),
        staying=staying,
    )
    before = places_of(working_set)
    problems, loads = run_cyclically(
        working_set,
        disk,
        passes=4,
        lookahead=data.draw(st.integers(0, 3), "lookahead"),
        rng=disk.rng,
    )
    assert problems == []
    for unit in staying:
        assert disk.loads.count(unit) == 1
        assert working_set.acquire(unit) == before[unit][0]
        working_set.release(unit)
    assert places_of(working_set) == before
    if sum(sizes) <= disk.capacity:
        assert loads == [len(sizes), 0, 0, 0]
    statistics = working_set.statistics()
    assert statistics.peak_bytes <= statistics.capacity_bytes
    assert statistics.peak_bytes >= least
    assert statistics.resident_units == ()  # staying is a place, not a promotion


@given(st.data())
def test_whatever_is_read_fetched_or_kept_what_stays_is_safe(
    data: st.DataObject,
) -> None:
    sizes = data.draw(st.lists(st.integers(1, 9), min_size=1, max_size=8), "sizes")
    staying = data.draw(st.sets(st.integers(0, len(sizes) - 1)), "staying")
    streamed = [n for unit, n in enumerate(sizes) if unit not in staying]
    least = sum(sizes[unit] for unit in staying) + max(streamed, default=0)
    working_set, disk = make(
        sizes,
        least + data.draw(st.integers(0, 20), "spare"),
        when=data.draw(st.sampled_from(WHENS), "when"),
        staying=staying,
    )
    checker = Checker(working_set, disk)
    units = st.integers(0, len(sizes) - 1)
    for act in data.draw(st.lists(st.sampled_from("eeellpkr"), max_size=40), "acts"):
        if act == "e":
            unit = data.draw(units)
            try:
                checker.enter(unit)
            except DoesNotFitError:
                assert unit not in staying, "its place is its own"
        elif act == "l" and checker.in_use:
            checker.leave(data.draw(st.sampled_from(sorted(checker.in_use))))
        elif act == "p":
            checker.expect(data.draw(st.lists(units, max_size=3, unique=True)))
        elif act == "k" and checker.in_use:
            working_set.keep(data.draw(st.sampled_from(sorted(checker.in_use))))
        elif act == "r":  # an interrupt cut all readers off
            working_set.release_all()
            checker.in_use.clear()
            checker.check()
        assert checker.problems == []
    working_set.release_all()
    checker.in_use.clear()
    for unit in range(len(sizes)):
        checker.enter(unit)
        checker.leave(unit)
    assert checker.problems == []
    assert all(disk.loads.count(unit) == 1 for unit in staying)


def test_what_stays_keeps_its_bytes_before_it_was_ever_loaded() -> None:
    working_set, disk = make([4, 4, 4], 8, staying=[1])
    problems, _ = run_cyclically(working_set, disk, passes=1, lookahead=0)
    assert problems == []
    assert working_set.acquire(0) != places_of(working_set)[1][0]


def test_what_stays_can_be_fetched_ahead() -> None:
    working_set, disk = make([4, 4, 4], 8, when="when waited for", staying=[1])
    working_set.acquire(0)
    working_set.prefetch([1, 2])
    assert disk.loads == [0, 1]  # for 2 there is no room beside 0
    working_set.acquire(1)
    assert disk.loads == [0, 1]


@pytest.mark.parametrize("how", ["fail", "refuse"])
def test_a_failed_load_of_what_stays_leaves_it_its_place(how: str) -> None:
    working_set, disk = make([4, 4, 4], 8, when="when waited for", staying=[1])
    place = places_of(working_set)[1][0]
    getattr(disk, how).add(1)
    with pytest.raises(ReadError, match="1"):
        working_set.acquire(1)
    working_set.acquire(0)
    assert working_set.acquire(1) == place
    assert disk.has(1, place)
    with pytest.raises(DoesNotFitError):
        working_set.acquire(2)


def test_one_that_stays_may_be_kept_at_no_cost() -> None:
    working_set, _ = make([4, 4, 8], 12, staying=[0])
    working_set.acquire(0)
    assert working_set.keep(0)
    assert working_set.is_resident(0)
    working_set.acquire(1)
    assert not working_set.keep(1)  # 4 would be left for 8


def test_keep_leaves_room_beside_what_stays() -> None:
    working_set, _ = make([4, 2, 6], 12, staying=[0], needed=[0, 1, 2])
    working_set.acquire(1)
    assert working_set.keep(1)
    roomless, _ = make([4, 3, 6], 12, staying=[0], needed=[0, 1, 2])
    roomless.acquire(1)
    assert not roomless.keep(1)


def test_what_does_not_fit_beside_what_stays_says_so() -> None:
    working_set, _ = make([10, 20, 30, 40], 60, staying=[0], needed=[])
    working_set.acquire(1)
    with pytest.raises(
        DoesNotFitError,
        match=r"^'unit3' needs 40 bytes with 20 in use and 10 resident, but the "
        r"working set has 60; set device_memory to at least 70$",
    ):
        working_set.acquire(3)
    working_set.acquire(0)  # read or not, it counts once
    with pytest.raises(DoesNotFitError, match=r"20 in use and 10 res.* least 70$"):
        working_set.acquire(3)


def test_more_than_there_is_cannot_stay() -> None:
    with pytest.raises(AssertionError, match="no room for unit 1, which is to stay"):
        make([4, 5], 8, staying=[0, 1])


@given(
    st.lists(st.integers(1, 9), min_size=1, max_size=12), st.integers(1, 30), st.data()
)
def test_what_stays_leaves_the_rest_in_one_piece(
    sizes: list[int], rest: int, data: st.DataObject
) -> None:
    """Else a unit as large as all the room would not fit."""
    capacity = sum(sizes) + rest
    working_set, _ = make([*sizes, rest], capacity, staying=range(len(sizes)))
    order = data.draw(st.permutations(range(len(sizes))))
    for unit in order:
        working_set.acquire(unit)
    working_set.acquire(len(sizes))
    ends = sorted(places_of(working_set).values())
    assert all(one[1] <= other[0] for one, other in itertools.pairwise(ends))
    assert working_set.statistics().peak_bytes == capacity

"""Units that nobody waits for, but that are used often, take slots of those that are
used less: never of one that is read or expected."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_working_set import WHENS, FakeDisk

from penstock.io.errors import DoesNotFitError, ReadError
from penstock.scheduler.slots.routing import ALWAYS
from penstock.scheduler.slots.working_set import WorkingSet


def make(disk: FakeDisk, worth: dict[int, int]) -> WorkingSet:
    units = range(len(disk.sizes))
    return WorkingSet(
        disk.sizes,
        names=[f"unit{unit}" for unit in units],
        capacity=disk.capacity,
        load=disk.load,
        mark=lambda: None,
        needed=frozenset(units),
        worth=lambda unit: worth.get(unit, ALWAYS),
    )


def read(working_set: WorkingSet, *units: int) -> None:
    for unit in units:
        working_set.acquire(unit)
        working_set.release(unit)


def test_they_take_free_bytes_after_what_is_needed() -> None:
    disk = FakeDisk([4, 4, 4, 4], 12)
    working_set = make(disk, {2: 10, 3: 1})
    working_set.prefetch([0, 1], [2, 3])
    assert disk.loads == [0, 1, 2]
    assert working_set.holds(2)
    assert not working_set.holds(3)


def test_they_replace_what_is_worth_half() -> None:
    disk = FakeDisk([4, 4, 4], 8)
    worth = {0: 200, 1: 50, 2: 99}
    working_set = make(disk, worth)
    read(working_set, 0, 1)
    working_set.prefetch([], [2])
    assert not working_set.holds(2)
    worth[2] = 100
    working_set.prefetch([], [2])
    assert working_set.holds(2)
    assert not working_set.holds(1)
    working_set.prefetch([], [2])
    assert disk.loads == [0, 1, 2], "it is there"


def test_they_never_replace_what_is_read_or_expected() -> None:
    disk = FakeDisk([4, 4, 4], 8)
    working_set = make(disk, {0: 1, 1: 1})
    working_set.acquire(0)
    working_set.prefetch([1], [2])
    working_set.prefetch([1], [2])
    assert disk.loads == [0, 1]


def test_what_is_needed_replaces_them() -> None:
    disk = FakeDisk([4, 4, 4], 8)
    working_set = make(disk, {1: 100})
    read(working_set, 0)
    working_set.prefetch([], [1])
    working_set.prefetch([0, 2])
    assert disk.loads == [0, 1, 2]
    assert not working_set.holds(1)


def test_one_that_is_needed_or_named_twice_is_loaded_once() -> None:
    disk = FakeDisk([2, 1, 1], 2)
    working_set = make(disk, {})
    working_set.prefetch([1], [1, 2, 2])
    assert disk.loads == [1, 2]
    read(working_set, 0)
    assert not working_set.holds(1)


def test_one_that_fails_is_no_error_until_somebody_needs_it() -> None:
    disk = FakeDisk([4, 4], 8, fail={1})
    working_set = make(disk, {})
    working_set.prefetch([0], [1])
    read(working_set, 0)
    with pytest.raises(ReadError, match="1 is unreadable"):
        working_set.acquire(1)
    read(working_set, 1)
    assert disk.loads == [0, 1, 1]


def test_none_is_loaded_after_close() -> None:
    disk = FakeDisk([4], 4)
    working_set = make(disk, {})
    working_set.close()
    working_set.prefetch([], [0])
    assert disk.loads == []


@given(st.data())
def test_whatever_is_loaded_the_weights_are_right(data: st.DataObject) -> None:
    sizes = data.draw(st.lists(st.integers(1, 9), min_size=1, max_size=8))
    capacity = max(sizes) + data.draw(st.integers(0, 20))
    units = st.integers(0, len(sizes) - 1)
    worth = {unit: data.draw(st.integers(1, ALWAYS)) for unit in range(len(sizes))}
    disk = FakeDisk(sizes, capacity, data.draw(st.sampled_from(WHENS)))
    working_set = make(disk, worth)
    some = st.lists(units, max_size=3, unique=True)
    in_use: dict[int, int] = {}
    for act in data.draw(st.lists(st.sampled_from("eelpt"), max_size=40)):
        if act == "e":
            unit = data.draw(units)
            try:
                in_use[unit] = working_set.acquire(unit)
            except DoesNotFitError:
                assert unit not in in_use
                continue
            if data.draw(st.booleans()):
                working_set.release(unit)
            if not working_set._held[unit].users:
                del in_use[unit]
        elif act == "l" and in_use:
            unit = data.draw(st.sampled_from(sorted(in_use)))
            while working_set._held[unit].users:
                working_set.release(unit)
            del in_use[unit]
        elif act == "p":
            working_set.prefetch(data.draw(some), data.draw(some))
        elif act == "t":
            disk.tick()
        assert all(disk.has(unit, offset) for unit, offset in in_use.items())

"""Slots are carved so that what is claimed is nobody's else, and found again."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from penstock.scheduler.slots.slots import Slot, Slots


def filled(capacity: int, sizes: list[int]) -> tuple[Slots, list[Slot]]:
    """Slots of as many `sizes` as fit, claimed for units 0, 1, 2, ..."""
    slots = Slots(capacity)
    claimed = []
    for unit, nbytes in enumerate(sizes):
        if (slot := slots.claim(unit, nbytes)) is not None:
            claimed.append(slot)
    return slots, claimed


def free_runs(capacity: int, claimed: list[Slot]) -> list[int]:
    """Lengths of the free pieces, found byte by byte."""
    taken = bytearray(capacity)
    for slot in claimed:
        taken[slot.offset : slot.end] = b"\1" * slot.nbytes
    return [len(run) for run in bytes(taken).split(b"\1") if run]


sizes = st.lists(st.integers(1, 40), min_size=1, max_size=12)


@given(st.integers(1, 120), st.lists(st.tuples(st.booleans(), st.integers(1, 40))))
def test_claimed_slots_never_overlap_and_stay_inside(
    capacity: int, steps: list[tuple[bool, int]]
) -> None:
    slots = Slots(capacity)
    claimed: list[Slot] = []
    for unit, (is_claim, nbytes) in enumerate(steps):
        if not is_claim:
            if claimed:
                slots.release(claimed.pop(nbytes % len(claimed)))
            continue
        slot = slots.claim(unit, nbytes)
        if slot is None:
            assert nbytes > max(free_runs(capacity, claimed), default=0)
            continue
        assert (slot.unit, slot.nbytes) == (unit, nbytes)
        claimed.append(slot)
        in_order = sorted(claimed, key=lambda s: s.offset)
        assert in_order[0].offset >= 0
        assert in_order[-1].end <= capacity
        assert all(a.end <= b.offset for a, b in itertools.pairwise(in_order))


@given(st.integers(1, 120), sizes)
def test_released_room_is_found_again(capacity: int, sizes: list[int]) -> None:
    slots, claimed = filled(capacity, sizes)
    for slot in claimed:
        slots.release(slot)
        again = slots.claim(slot.unit, slot.nbytes)
        assert again is not None
        slots.release(again)
    assert slots.claim(99, capacity) == Slot(99, 0, capacity)


@given(st.integers(1, 60), st.data())
def test_neighbours_in_time_that_fit_together_always_fit_alternately(
    capacity: int, data: st.DataObject
) -> None:
    slots = Slots(capacity)
    previous: Slot | None = None
    for unit in range(12):
        room = capacity - (previous.nbytes if previous else 0)
        if room == 0:
            break
        slot = slots.claim(unit, data.draw(st.integers(1, room)))
        assert slot is not None
        if previous is not None:
            slots.release(previous)
        previous = slot


def test_the_smallest_gap_that_fits_is_taken() -> None:
    slots, claimed = filled(100, [10, 10, 20, 10, 30])
    assert [(s.offset, s.end) for s in sorted(claimed, key=lambda s: s.unit)] == [
        (0, 10),
        (90, 100),  # the neighbour in time, at the other end
        (10, 30),
        (30, 40),
        (40, 70),
    ]
    slots.release(claimed[2])
    assert slots.claim(7, 20) == Slot(7, 10, 20)  # not 70 to 90, which came later
    slots.release(claimed[3])
    assert slots.claim(8, 8) == Slot(8, 30, 8)  # of 10 bytes, not of 20


def test_nothing_is_no_size_to_claim() -> None:
    with pytest.raises(AssertionError, match="no bytes"):
        Slots(10).claim(0, 0)


@given(st.integers(10, 60), sizes, st.integers(1, 60), st.data())
def test_cheapest_room_makes_room_and_none_is_cheaper(
    capacity: int, sizes: list[int], wanted: int, data: st.DataObject
) -> None:
    slots, claimed = filled(capacity, sizes)
    if max(free_runs(capacity, claimed), default=0) >= wanted:
        return  # room is made only where there is none
    costs = {
        slot.unit: data.draw(st.integers(1, 9), f"cost of {slot.unit}")
        for slot in claimed
        if data.draw(st.booleans(), f"may {slot.unit} go?")
    }

    evicted = slots.cheapest_room(wanted, costs)

    def makes_room(units: tuple[int, ...]) -> bool:
        left = [slot for slot in claimed if slot.unit not in units]
        return max(free_runs(capacity, left), default=0) >= wanted

    enough = [
        sum(costs[unit] for unit in units)
        for count in range(1, len(costs) + 1)
        for units in itertools.combinations(costs, count)
        if makes_room(units)
    ]
    if not enough:
        assert evicted == []
        return
    assert set(evicted) <= set(costs)
    assert sum(costs[unit] for unit in evicted) == min(enough)
    for slot in claimed:
        if slot.unit in evicted:
            slots.release(slot)
    assert slots.claim(99, wanted) is not None


@given(st.integers(1, 60), sizes, st.sets(st.integers(0, 11)))
def test_the_largest_gap_beside_what_stays_is_what_could_be_had(
    capacity: int, sizes: list[int], pinned: set[int]
) -> None:
    slots, claimed = filled(capacity, sizes)
    left = [slot for slot in claimed if slot.unit in pinned]
    assert slots.largest_gap_beside(pinned) == max(free_runs(capacity, left), default=0)
    assert slots.used_bytes == sum(slot.nbytes for slot in claimed)  # it only looked


@given(st.integers(1, 60), sizes, st.sets(st.integers(0, 11)), sizes)
def test_what_is_said_to_fit_beside_what_stays_does(
    capacity: int, sizes: list[int], pinned: set[int], wanted: list[int]
) -> None:
    slots, claimed = filled(capacity, sizes)
    fits = slots.fit_beside(pinned, wanted)
    for slot in claimed:
        if slot.unit not in pinned:
            slots.release(slot)
    placed = [slots.claim(-1, nbytes) for nbytes in sorted(wanted, reverse=True)]
    assert fits == (None not in placed)
    if len(wanted) == 1:
        assert fits == (wanted[0] <= slots.largest_gap_beside(pinned))


def test_use_over_capacity_is_shown() -> None:
    slots, _ = filled(100, [30, 40])
    assert slots.used_bytes == 70
    assert repr(slots) == "<Slots: 2, 70/100 bytes>"

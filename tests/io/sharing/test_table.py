"""What a process does about a piece, by the table of a ring."""

from __future__ import annotations

import pytest
from shared_drive import empty_table

from penstock.io.sharing.table import Answer, Do, Key, Table

ONE = Key((1, 2), 0, 100)
TWO = Key((1, 2), 100, 100)
THREE = Key((1, 2), 200, 100)


def together(num_slots: int = 2, seats: int = 2) -> Table:
    """A table whose processes have begun a pass together."""
    table = empty_table(num_slots, seats)
    for seat in range(seats):
        table.attach(seat)
        table.arrive(seat)
    assert table.depart(0, is_first=True, gone=0, is_patient=True)
    return table


def look(
    table: Table, seat: int, key: Key, *, gone: int = 0, is_patient: bool = True
) -> Answer:
    return table.look(seat, key, gone=gone, is_patient=is_patient, may_read=True)


def published(table: Table, seat: int, key: Key) -> int:
    found = look(table, seat, key)
    assert found.do is Do.CLAIM
    table.publish(seat, found.slot)
    return found.slot


def test_the_first_one_reads_a_piece_and_the_others_take_it() -> None:
    table = together()
    found = look(table, 0, ONE)
    assert found == Answer(Do.CLAIM, 0)
    assert look(table, 1, ONE).do is Do.WAIT
    table.publish(0, 0)
    assert look(table, 1, ONE) == Answer(Do.TAKE, 0)
    table.taken(1, 0)
    assert table.counts == (100, 100)


def test_pieces_differ_by_file_offset_and_length() -> None:
    table = together(4)
    published(table, 0, ONE)
    for other in (Key((1, 3), 0, 100), Key((1, 2), 4, 100), Key((1, 2), 0, 50)):
        assert look(table, 1, other).do is Do.CLAIM
        assert table.find(other) != table.find(ONE)


def test_a_slot_is_used_again_once_all_have_taken_it() -> None:
    table = together(1)
    slot = published(table, 0, ONE)
    assert look(table, 0, TWO).do is Do.WAIT_FOR_ROOM
    assert look(table, 1, ONE).do is Do.TAKE
    assert look(table, 0, TWO).do is Do.WAIT_FOR_ROOM, "it is being copied"
    table.taken(1, slot)
    assert look(table, 0, TWO) == Answer(Do.CLAIM, slot)


def test_who_is_patient_no_more_overruns_a_piece_and_who_missed_it_is_out_of_step() -> (
    None
):
    table = together(1)
    published(table, 0, ONE)
    assert look(table, 0, TWO, is_patient=False).do is Do.CLAIM
    assert table.members == 1
    assert look(table, 1, ONE).do is Do.READ_ALONE
    assert not table.is_in_step(0, gone=0)


def test_nobody_overruns_what_is_copied_at_this_moment_nor_what_it_wants_itself() -> (
    None
):
    table = together(1)
    published(table, 0, ONE)
    assert look(table, 1, TWO, is_patient=False).do is Do.READ_ALONE, "it wants ONE"
    assert look(table, 1, ONE).do is Do.TAKE
    assert look(table, 0, TWO, is_patient=False).do is Do.READ_ALONE, "it is pinned"


def test_alone_nothing_is_put_into_the_ring() -> None:
    table = together(2, seats=1)
    assert look(table, 0, ONE).do is Do.READ_ALONE
    both = together()
    both.bury(2)
    assert look(both, 0, ONE).do is Do.READ_ALONE
    assert look(together(), 0, ONE, gone=2).do is Do.READ_ALONE


def test_what_a_dead_process_was_reading_another_one_reads() -> None:
    table = together(3, seats=3)
    assert look(table, 0, ONE).do is Do.CLAIM
    slot = published(table, 1, TWO)
    assert look(table, 0, TWO).do is Do.TAKE
    table.bury(1)
    assert look(table, 1, ONE).do is Do.CLAIM
    assert look(table, 2, TWO).do is Do.TAKE
    table.taken(2, slot)
    assert table.attached == 6
    assert table.members == 6
    found = {look(table, 1, key).slot for key in (THREE, THREE._replace(offset=300))}
    assert found == {slot, 2}, "what it had pinned is free"


def test_what_a_stopped_process_reads_is_not_waited_for() -> None:
    table = together(2, seats=3)
    look(table, 0, ONE)
    assert look(table, 1, ONE, gone=1).do is Do.READ_ALONE
    assert look(table, 2, ONE, gone=0).do is Do.WAIT


def test_a_read_that_failed_leaves_the_piece_to_others() -> None:
    table = together()
    slot = look(table, 0, ONE).slot
    table.abandon(slot)
    assert look(table, 1, ONE).do is Do.CLAIM


def test_a_pass_begins_when_all_have_arrived() -> None:
    table = empty_table(2, 3)
    table.attach(0)
    table.attach(1)
    table.arrive(0)
    table.arrive(1)
    assert not table.depart(0, is_first=True, gone=0, is_patient=True), (
        "the third has yet to come"
    )
    table.attach(2)
    assert not table.depart(0, is_first=False, gone=0, is_patient=True)
    table.arrive(2)
    assert table.depart(2, is_first=False, gone=0, is_patient=True)
    assert table.depart(0, is_first=True, gone=0, is_patient=True), "it was taken along"
    assert table.members == 7
    assert all(table.is_in_step(seat, gone=0) for seat in range(3))


@pytest.mark.parametrize(("gone", "is_patient"), [(6, True), (0, False)])
def test_a_pass_begins_without_those_that_do_not_come(
    gone: int, is_patient: bool
) -> None:
    table = empty_table(2, 3)
    for seat in range(3):
        table.attach(seat)
    table.arrive(0)
    assert table.depart(0, is_first=False, gone=gone, is_patient=is_patient)
    assert table.members == 1
    assert table.is_in_step(0, gone=6)
    assert not table.is_in_step(0, gone=0)


def test_a_seat_that_another_process_takes_over_is_waited_for_again() -> None:
    table = together()
    look(table, 1, ONE)
    table.bury(2)
    table.arrive(0)
    assert table.depart(0, is_first=False, gone=0, is_patient=True)
    table.attach(1)
    table.arrive(0)
    assert not table.depart(0, is_first=False, gone=0, is_patient=True)
    table.arrive(1)
    assert table.depart(1, is_first=True, gone=0, is_patient=True)
    assert look(table, 0, ONE).do is Do.CLAIM

"""Workers on one drive, in simulated time: what they read, how long it takes, and that
nobody waits for ever."""

from __future__ import annotations

import random

import pytest
from shared_drive import Worker, simulate

from penstock.io.sharing.pass_clock import Mode, PassClock
from penstock.io.sharing.patience import (
    PassTimes,
    late_seconds,
    poll_seconds,
    purse_after,
    saved_seconds,
)
from penstock.io.sharing.pieces import PassStarts
from penstock.io.sharing.table import Key

PIECES = 48
"""Of a pass of a simulated worker; the drive takes 4.8 s for them."""


def test_two_workers_in_step_read_each_piece_once_and_take_half_the_time() -> None:
    workers = [Worker(seat, 0.3 * seat, 6, 0.02) for seat in range(2)]
    drive = simulate(workers)
    assert drive.num_read == 6 * PIECES
    assert max(worker.end for worker in workers) < 6 * 4.8 + 0.5


def test_four_workers_read_each_piece_once() -> None:
    workers = [Worker(seat, 0.2 * seat, 4, 0.02) for seat in range(4)]
    assert simulate(workers, num_slots=32).num_read == 4 * PIECES


@pytest.mark.parametrize("late", [7.0, 12.0, 16.4, 30.0])
def test_one_that_comes_late_gets_into_step(late: float) -> None:
    """It costs at most the passes before, and one more."""
    workers = [Worker(0, 0, 14, 0.02), Worker(1, late, 14, 0.02)]
    drive = simulate(workers)
    alone = int(2 * late / 4.8) + 2  # passes in which one of them was not there
    assert drive.num_read <= (14 + alone) * PIECES
    assert workers[1].num_taken > (14 - alone) * PIECES // 3


def test_one_that_pauses_between_passes_comes_back_into_step() -> None:
    workers = [Worker(0, 0, 12, 0.02), Worker(1, 0, 12, 0.02, pauses={3: 6.0})]
    assert simulate(workers).num_read <= 14 * PIECES


def test_one_that_waits_for_rows_holds_up_the_other_for_a_pass_at_most() -> None:
    workers = [Worker(0, 0, 8, 0.02), Worker(1, 0, 8, 0.02, pauses={2: 200.0})]
    simulate(workers)
    assert workers[0].end <= (8 + 1) * 4.8 + 2


def test_workers_that_computing_limits_do_not_wait_for_each_other() -> None:
    """As long as the first, but for the start."""
    fast, slow = Worker(0, 0, 8, 1.0), Worker(1, 0.5, 8, 3.0)
    simulate([fast, slow])
    assert fast.end <= 8 * 12 * 1.02 + 0.5 + 5.5
    assert slow.end <= 0.5 + 8 * 12 * 3.02 + 2


def test_nobody_is_much_slower_than_without_sharing() -> None:
    """Whatever their speeds, starts and pauses: a pass of the drive each, and the time
    to begin."""
    drawn = random.Random(5)
    for _ in range(8):
        passes = [drawn.randint(1, 8) for _ in range(2)]

        def made(
            passes: list[int] = passes, seed: float = drawn.random()
        ) -> list[Worker]:
            own = random.Random(seed)
            return [
                Worker(
                    seat,
                    own.uniform(0, 10),
                    passes[seat],
                    own.choice([0.0, 0.02, 0.3, 0.6, 2.0]),
                    pauses={own.randint(0, 4): own.uniform(0, 9)},
                )
                for seat in range(2)
            ]

        shared, alone = made(), made()
        slots = drawn.choice([4, 8, 16, 64])
        drive = simulate(shared, num_slots=slots)
        other = simulate(alone, is_shared=False)
        assert drive.num_read <= other.num_read
        for one, two in zip(shared, alone, strict=True):
            assert one.end <= two.end * 1.05 + 5 + 2 * 4.8


def test_waiting_is_paid_for_by_what_was_saved() -> None:
    def times(idle: float, read: int, taken: int, waited: float = 0.0) -> PassTimes:
        return PassTimes(
            seconds=10,
            idle_seconds=idle,
            waited_seconds=waited,
            read_bytes=read,
            taken_bytes=taken,
        )

    assert saved_seconds(times(0, 100, 100), is_first=False) == 10
    assert saved_seconds(times(0, 100, 0), is_first=False) == 0
    assert saved_seconds(times(0, 100, 0), is_first=True) == 10, "on trust"
    assert saved_seconds(times(6, 100, 100), is_first=False) == 0, "not the drive"
    assert saved_seconds(times(2, 100, 100, 2), is_first=False) == 4
    assert saved_seconds(times(0, 0, 0), is_first=False) == 0
    assert purse_after(3, times(0, 100, 50), is_first=False) == 8
    assert purse_after(8, times(0, 100, 50), is_first=False) == 10, "a pass at most"
    assert purse_after(5, times(10, 0, 0), is_first=True) == 0
    assert purse_after(-1, times(0, 1, 0), is_first=False) == -1
    assert (late_seconds(0.1), late_seconds(10)) == (10, 40)
    assert (poll_seconds(0), poll_seconds(0.04), poll_seconds(9)) == (
        0.001,
        0.005,
        0.01,
    )


def test_a_clock_says_what_a_pass_was_made_of() -> None:
    clock = PassClock(0.0)
    assert clock.enter(Mode.BUSY, 1.0) == 0
    clock.begin((10, 20))
    assert clock.enter(Mode.WAITING, 3.0) == 0
    assert clock.enter(Mode.IDLE, 7.0) == 4
    assert clock.enter(Mode.BUSY, 8.0) == 0
    found = clock.end((15, 40))
    assert (found.seconds, found.waited_seconds, found.idle_seconds) == (7, 4, 1)
    assert (found.busy_seconds, found.read_bytes, found.taken_bytes) == (2, 5, 20)


def test_a_pass_begins_with_the_first_piece_that_comes_again() -> None:
    passes = PassStarts()
    keys = [Key((0, 0), offset, 1) for offset in (9, 1, 2, 3, 1, 2, 3, 1)]
    found = [passes.begins(key) for key in keys]
    assert found == [True, False, False, False, True, False, False, True]

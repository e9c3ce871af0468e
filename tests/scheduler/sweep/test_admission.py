"""As many micro-batches are admitted as hold together what the budget allows."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from penstock.scheduler.sweep.admission import _OVERHEAD_BYTES, Admission

MANY = 10_000
KIB = 1 << 10


def room(admission: Admission) -> int:
    """How many it would admit in all."""
    num = 0
    while num < MANY and admission.has_room(num):
        num += 1
    return num


def scouted(
    budget: int, *held: int, num_sites: int = 10, width: int | None = None
) -> Admission:
    """After the first micro-batch held `held` at its second, third, ... site."""
    admission = Admission(width=width, activation_bytes=budget, num_sites=num_sites)
    for num, nbytes in enumerate(held, 2):
        if admission.wants(0, num):
            admission.note(0, num, nbytes)
    return admission


def test_without_bounds_all_are_admitted() -> None:
    admission = Admission(width=None, activation_bytes=None, num_sites=5)
    assert room(admission) == MANY


def test_the_width_bounds_whatever_the_budget() -> None:
    assert room(Admission(width=3, activation_bytes=None, num_sites=5)) == 3
    assert room(scouted(1 << 40, 8, 8, width=3)) == 3


def test_one_is_always_admitted() -> None:
    assert room(scouted(1, 1 << 30, 1 << 30)) == 1


def test_the_first_goes_alone_until_it_has_shown_what_it_keeps() -> None:
    admission = Admission(width=None, activation_bytes=1 << 40, num_sites=5)
    assert room(admission) == 1
    assert admission.wants(0, 1)
    admission.note(0, 1, 100 * KIB)  # its inputs: it has not run anything yet
    assert room(admission) == 1
    assert admission.largest_held_bytes == 100 * KIB


def test_before_growth_is_known_the_worst_is_assumed() -> None:
    cautious = scouted(1 << 30, 1 << 20)
    informed = scouted(1 << 30, 1 << 20, 1 << 20)
    assert not cautious.is_settled
    assert informed.is_settled
    assert 1 < room(cautious) < room(informed) <= (1 << 30) // (1 << 20)


def test_hidden_states_alone_are_counted_as_they_are() -> None:
    budget = 7 * (64 * KIB + _OVERHEAD_BYTES)
    assert room(scouted(budget, 64 * KIB, 64 * KIB)) == 7
    assert room(scouted(budget - 1, 64 * KIB, 64 * KIB)) == 6


def test_a_cache_that_grows_with_every_block_is_counted_full_grown() -> None:
    """64 KiB of hidden states, and 32 KiB more after each of the 9 sites before the
    last one's site."""
    full = 64 * KIB + 8 * 32 * KIB
    budget = 4 * (full + _OVERHEAD_BYTES)
    assert room(scouted(budget, 64 * KIB, 96 * KIB, num_sites=10)) == 4


def test_what_shrinks_is_counted_as_it_was() -> None:
    budget = 3 * (64 * KIB + _OVERHEAD_BYTES)
    assert room(scouted(budget, 64 * KIB, 8 * KIB)) == 3


def test_a_cache_that_outgrows_the_forecast_leaves_room_for_fewer() -> None:
    held = [64 * KIB] * 6 + [640 * KIB]  # at the second to seventh site, at the eighth
    admission = scouted(10 * (64 * KIB + _OVERHEAD_BYTES), *held[:-1])
    assert room(admission) == 10
    assert [num for num in range(4, 20) if admission.wants(0, num)] == [4, 8, 16]
    admission.note(0, 8, held[-1])
    assert room(admission) == 1
    assert admission.largest_held_bytes == 640 * KIB


def test_the_largest_batch_seen_stands_for_all() -> None:
    budget = 12 * (64 * KIB + _OVERHEAD_BYTES)
    admission = scouted(budget, 64 * KIB, 64 * KIB)
    assert room(admission) == 12
    assert admission.wants(5, 2)
    assert not admission.wants(5, 3)  # the first alone is watched all the way
    admission.note(5, 2, 3 * 64 * KIB)
    assert room(admission) < 12 // 2


def test_without_a_budget_only_one_is_looked_at() -> None:
    admission = Admission(width=4, activation_bytes=None, num_sites=5)
    admission.note(2, 2, 64 * KIB)
    assert admission.wants(2, 3)
    assert not any(admission.wants(3, num) for num in range(1, 40))
    assert admission.largest_held_bytes == 64 * KIB


def test_one_that_ends_before_it_shows_its_growth_has_shown_enough() -> None:
    admission = scouted(1 << 30, 1 << 20)
    guess = room(admission)
    admission.finish(0, failed=False)
    assert admission.is_settled
    assert room(admission) > guess


def test_one_that_fails_is_no_example() -> None:
    admission = scouted(1 << 30, 1 << 20)
    admission.finish(0, failed=True)
    assert not admission.is_settled
    assert admission.wants(3, 2)
    admission.note(3, 2, 1 << 20)
    admission.note(3, 3, 2 << 20)
    assert admission.is_settled


def test_one_that_ends_having_held_nothing_lets_the_next_one_try() -> None:
    admission = Admission(width=None, activation_bytes=1 << 30, num_sites=1)
    admission.note(0, 1, 1 << 20)
    admission.finish(0, failed=False)
    assert room(admission) == 1


@given(
    st.lists(st.integers(0, 1 << 30), min_size=1, max_size=12),
    st.integers(1, 1 << 34),
    st.integers(1, 100),
)
def test_what_was_seen_to_be_held_fits_the_budget_as_often_as_it_is_admitted(
    held: list[int], budget: int, num_sites: int
) -> None:
    admission = scouted(budget, *held, num_sites=num_sites)
    num = room(admission)
    if num < MANY:
        assert num == 1 or num * max(held[:2]) <= budget
    assert admission.largest_held_bytes <= max(held)

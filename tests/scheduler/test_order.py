"""What runs next is learnt from what ran, and everybody's turn comes round."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from penstock.scheduler.order import Order


def learnt(num_sites: int, *paths: list[int]) -> Order:
    """An order that saw micro-batches walk these paths to their ends."""
    order = Order(num_sites)
    for path in paths:
        previous = None
        for index, site in enumerate(path):
            order.observe(previous, site, is_repeat=site in path[:index])
            previous = site
        order.observe_end(previous)
    return order


def sweep(order: Order, paths: list[list[int]]) -> list[tuple[int, list[int]]]:
    """The rounds in which a hub would serve walkers on these paths: (site, who)."""
    left = {who: list(path) for who, path in enumerate(paths)}
    walked: dict[int, list[int]] = {who: [] for who in left}
    waiting: dict[int, list[int]] = {}

    def walk_on(who: int) -> None:
        if left[who]:
            site, seen = left[who].pop(0), walked[who]
            order.observe(seen[-1] if seen else None, site, is_repeat=site in seen)
            seen.append(site)
            waiting.setdefault(site, []).append(who)

    for who in left:
        walk_on(who)
    rounds: list[tuple[int, list[int]]] = []
    position = None
    while waiting:
        position = order.nearest(position, set(waiting))
        served = waiting.pop(position)
        rounds.append((position, served))
        for who in served:
            walk_on(who)
    return rounds


# Prediction.


def test_before_anything_ran_sites_follow_in_definition_order() -> None:
    order = Order(4)
    assert order.first == 0
    assert order.upcoming(0, [], 2) == (1, 2)
    assert order.upcoming(2, [], 5) == (3,)


def test_no_sites_no_prediction() -> None:
    assert Order(0).first is None
    assert Order(0).upcoming(0, [], 3) == ()


def test_what_followed_last_is_expected_to_follow_again() -> None:
    order = learnt(4, [2, 0, 3, 1])
    assert order.first == 2
    assert order.upcoming(2, [], 3) == (0, 3, 1)
    order.observe(2, 3, is_repeat=False)
    assert order.predict(2) == 3


def test_the_first_pass_is_predicted_as_far_as_it_was_not_seen() -> None:
    order = Order(5)
    order.observe(None, 0, is_repeat=False)
    order.observe(0, 1, is_repeat=False)
    assert order.upcoming(1, [], 2) == (2, 3)


def test_after_the_last_site_the_first_of_the_next_pass_is_expected() -> None:
    order = learnt(3, [0, 1, 2, 0, 1, 2])
    assert order.upcoming(2, [], 2) == (0, 1)
    assert order.upcoming(1, [], 3) == (2, 0)  # not the one that is running


def test_a_new_micro_batch_that_is_expected_brings_the_first_site() -> None:
    order = learnt(3, [0, 1, 2])
    assert order.upcoming(2, [], 1) == ()
    assert order.upcoming(2, [0], 1) == (0,)


def test_what_was_defined_after_the_end_is_not_expected_at_every_end() -> None:
    """An encoder alone is run; the decoder is defined after it."""
    order = learnt(4, [0, 1])
    assert order.predict(1) is None
    assert order.upcoming(1, [0], 2) == (0,)


def test_who_waits_nearer_is_expected_before_who_follows() -> None:
    order = learnt(5, [0, 1, 2, 3, 4])
    order.observe(0, 3, is_repeat=False)  # this one skipped 1 and 2
    assert order.upcoming(0, [2], 2) == (2, 3)


def test_a_site_is_expected_once_however_many_wait_there() -> None:
    order = learnt(3, [0, 1, 2, 0])
    assert order.upcoming(0, [0, 1, 2], 8) == (1, 2)


def test_what_stays_is_expected_but_not_counted() -> None:
    order = learnt(6, [0, 1, 2, 3, 4, 5])
    assert order.upcoming(0, [], 2, lambda site: site % 2 == 0) == (1, 2, 3)
    assert order.upcoming(0, [], 1, lambda site: True) == (1, 2, 3, 4, 5)
    assert order.upcoming(1, [0], 2, lambda site: site != 1) == (2, 3, 4, 5, 0)


def test_no_lookahead_expects_nothing() -> None:
    assert learnt(3, [0, 1, 2]).upcoming(0, [1, 2], 0) == ()


def test_a_block_that_repeats_itself_expects_who_waits_elsewhere() -> None:
    order = learnt(3, [0, 1, 1, 1, 2])
    order.observe(1, 1, is_repeat=True)
    assert order.upcoming(1, [], 2) == ()
    assert order.upcoming(1, [2], 2) == (2,)


# The order of service.


def test_everybody_is_served_at_a_site_before_the_next_site_opens() -> None:
    rounds = sweep(Order(3), [[0, 1, 2]] * 3)
    assert rounds == [(0, [0, 1, 2]), (1, [0, 1, 2]), (2, [0, 1, 2])]


def test_stragglers_are_caught_up_with_on_the_way_round() -> None:
    order = learnt(4, [0, 1, 2, 3])
    assert order.nearest(1, {0, 2}) == 2
    assert order.nearest(1, {0, 1}) == 0  # going round; the same one comes last
    assert order.nearest(3, {0, 1}) == 0
    assert order.nearest(None, {3, 1}) == 1


def test_who_skips_a_block_waits_for_the_others_behind_it() -> None:
    rounds = sweep(Order(4), [[0, 1, 2, 3], [0, 2, 3], [0, 1, 2, 3], [0, 3]])
    assert rounds == [
        (0, [0, 1, 2, 3]),
        (1, [0, 2]),
        (2, [1, 0, 2]),
        (3, [3, 1, 0, 2]),
    ]


def test_branches_are_served_one_after_the_other_and_meet_again() -> None:
    rounds = sweep(Order(4), [[0, 1, 3], [0, 2, 3], [0, 1, 3]])
    assert [site for site, _ in rounds] == [0, 1, 2, 3]
    assert sorted(rounds[-1][1]) == [0, 1, 2]


def test_a_block_that_runs_earlier_than_defined_is_moved_to_where_it_runs() -> None:
    order, paths = Order(5), [[0, 1, 2, 3], [0, 1, 4, 2, 3]]
    first = sweep(order, paths)
    assert [site for site, _ in first] == [0, 1, 2, 3, 4, 2, 3]
    second = sweep(order, paths)
    assert [site for site, _ in second] == [0, 1, 4, 2, 3]


@given(st.permutations(range(6)), st.lists(st.sets(st.integers(0, 5)), max_size=5))
def test_whatever_the_order_each_site_soon_opens_once_a_pass(
    run_order: list[int], batches: list[set[int]]
) -> None:
    order = Order(6)
    paths = [[site for site in run_order if site in batch] for batch in batches]
    for _ in range(6):
        rounds = sweep(order, paths)
    opened = [site for site, _ in rounds]
    assert len(opened) == len(set(opened))


def test_an_encoder_runs_once_and_its_decoder_loops_in_step() -> None:
    encoder, decoder, head = [0, 1], [2, 3], [4]
    path = encoder + (decoder + head) * 3
    rounds = sweep(Order(5), [path] * 4)
    assert [site for site, _ in rounds] == path
    order = learnt(5, path)
    assert order.upcoming(4, [], 2) == (2, 3)
    assert order.upcoming(1, [], 1) == (2,)
    assert order.first == 0


def test_loops_of_different_lengths_share_every_pass_they_can() -> None:
    rounds = sweep(Order(2), [[0, 1] * 1, [0, 1] * 3, [0, 1] * 2])
    assert [site for site, _ in rounds] == [0, 1] * 3
    assert [len(who) for _, who in rounds] == [3, 3, 2, 2, 1, 1]


@given(st.lists(st.lists(st.integers(0, 5), max_size=12), min_size=1, max_size=5))
def test_any_paths_at_all_are_walked_to_their_ends(paths: list[list[int]]) -> None:
    rounds = sweep(Order(6), paths)
    walked: dict[int, list[int]] = {who: [] for who in range(len(paths))}
    for site, served in rounds:
        for who in served:
            walked[who].append(site)
    assert walked == dict(enumerate(paths))


@given(
    st.lists(st.lists(st.integers(0, 5), max_size=8), max_size=4),
    st.integers(0, 5),
    st.sets(st.integers(0, 5)),
    st.integers(0, 4),
)
def test_expected_sites_are_others_and_each_is_named_once(
    paths: list[list[int]], site: int, waiting: set[int], depth: int
) -> None:
    found = learnt(6, *paths).upcoming(site, waiting, depth)
    assert len(found) <= depth
    assert site not in found
    assert len(set(found)) == len(found)
    assert all(0 <= other < 6 for other in found)


# Passes.


def test_going_back_is_another_pass() -> None:
    order = learnt(3, [0, 1, 2])
    assert order.is_ahead(0, 2)
    assert not order.is_ahead(2, 0)
    assert not order.is_ahead(None, 0)
    assert not order.is_ahead(0, 9)


def test_a_shared_block_that_runs_again_does_not_end_the_pass() -> None:
    assert learnt(3, [0, 1, 1, 2]).is_ahead(1, 1)
    assert not learnt(1, [0, 0]).is_ahead(0, 0)  # it is the whole model


@pytest.mark.parametrize(
    ("site", "expected"), [(None, 0.0), (2, 0.0), (0, 0.25), (1, 0.5), (3, 0.0)]
)
def test_how_far_a_pass_is_follows_the_order_that_was_learnt(
    site: int | None, expected: float
) -> None:
    assert learnt(4, [2, 0, 1]).fraction(site) == expected

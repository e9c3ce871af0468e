"""Experts are loaded as micro-batches choose them; all of them where nearly all are."""

from __future__ import annotations

from penstock.scheduler.slots.routing import ALWAYS, Routing

FIRST: dict[int, tuple[int, ...]] = {1: (10, 11, 12, 13), 2: (14, 15, 16, 17)}
SECOND: dict[int, tuple[int, ...]] = {4: (20, 21, 22, 23), 5: (24, 25, 26, 27)}


def routing() -> Routing:
    return Routing([FIRST, SECOND], [100] * 28)


def ask(found: Routing, needs: dict[int, tuple[int, ...]], num_tokens: int = 1) -> None:
    """A micro-batch chooses, each piece with so many tokens."""
    found.ask({site: dict.fromkeys(units, num_tokens) for site, units in needs.items()})


def withdraw(found: Routing, site: int, units: tuple[int, ...]) -> None:
    found.withdraw(site, dict.fromkeys(units, 1))


def run(found: Routing, needs: dict[int, tuple[int, ...]]) -> None:
    """A micro-batch chooses, and runs window by window."""
    ask(found, needs)
    for site, units in needs.items():
        found.open(site)
        for unit in units:
            found.use(unit)
        withdraw(found, site, units)


def test_what_any_micro_batch_needs_is_expected_in_order() -> None:
    found = routing()
    assert found.expected(1) == ()
    ask(found, {1: (13, 10), 2: (15,)})
    ask(found, {1: (11, 10)})
    assert found.expected(1) == (10, 11, 13)
    assert found.asked_windows == {1, 2}
    withdraw(found, 1, (13, 10))
    assert found.expected(1) == (10, 11), "another one still needs these"
    withdraw(found, 1, (11, 10))
    withdraw(found, 2, (15,))
    assert found.asked_windows == set()


def test_all_are_expected_after_a_layer_that_used_nearly_all() -> None:
    found = routing()
    run(found, FIRST)
    assert found.expected(4) == SECOND[4]
    assert found.expected(5) == SECOND[5]


def test_none_is_expected_after_a_layer_that_used_few() -> None:
    found = routing()
    run(found, FIRST)
    run(found, {4: (20, 21), 5: (24,)})
    assert found.expected(1) == ()


def test_the_share_is_that_of_all_micro_batches_and_windows() -> None:
    """The last window of a layer does not count as a layer."""
    found = routing()
    ask(found, {1: (10, 11), 2: (14,)})
    ask(found, {1: (12, 13), 2: (15, 16, 17)})
    for site in (1, 2):
        found.open(site)
        for units in ((10, 11), (12, 13)) if site == 1 else ((14,), (15, 16, 17)):
            withdraw(found, site, units)
    assert found.expected(4) == SECOND[4]


def test_what_is_used_less_is_worth_less() -> None:
    found = routing()
    for _ in range(20):
        run(found, {1: (10,), 2: (14,)})
    assert found.worth(10) == ALWAYS
    assert 1 <= found.worth(11) < ALWAYS // 8
    assert found.worth(0) == ALWAYS, "no expert"


def test_bytes_are_counted_once_while_a_window_is_open() -> None:
    found = routing()
    ask(found, {1: (10,)})
    ask(found, {1: (10, 11)})
    found.open(1)
    for unit in (10, 10, 11):
        found.use(unit)
    assert found.touched_bytes == 200
    found.load(10)
    found.load(0)
    assert found.loaded_bytes == 100, "unit 0 is no expert"


def test_a_model_without_experts_has_no_windows() -> None:
    found = Routing((), ())
    assert not found
    assert not found.is_window(0)
    assert found.worth(0) == ALWAYS


HELD = frozenset({12})


def with_host() -> Routing:
    """The pieces of the first layer lie in host memory, and are loaded for 4 tokens."""
    least = {unit: 4 for units in FIRST.values() for unit in units}
    return Routing([FIRST, SECOND], [100] * 28, least)


def test_what_few_tokens_chose_is_computed_on_the_host() -> None:
    """All micro-batches count, until their window is open. What has a slot already is
    used there."""
    found = with_host()
    found.ask({1: {10: 3, 11: 2, 12: 1}, 4: {20: 1}})
    assert found.expected(1, HELD.__contains__) == (12,)
    found.ask({1: {11: 2, 13: 1}})
    assert found.expected(1, HELD.__contains__) == (11, 12)
    found.open(1, HELD.__contains__)
    assert [unit for unit in FIRST[1] if found.is_on_host(unit)] == [10, 13]
    found.withdraw(1, {10: 3, 11: 2, 12: 1})
    assert not found.is_on_host(11), "it was decided for all that wait"
    found.ask({1: {10: 9}})
    assert found.is_on_host(10), "one that comes later does as the others do"
    found.open(4)
    assert not found.is_on_host(20), "it does not lie in host memory"


def test_layers_that_the_host_computes_are_not_loaded_ahead() -> None:
    found = with_host()
    ask(found, FIRST)
    found.open(1)
    withdraw(found, 1, FIRST[1])
    withdraw(found, 2, FIRST[2])
    assert found.expected(4) == ()
    ask(found, FIRST, num_tokens=4)
    found.open(1)
    assert found.expected(4) == SECOND[4]


def test_what_the_host_computes_is_counted() -> None:
    found = with_host()
    found.ask({1: {10: 2}})
    found.open(1)
    found.use_on_host(10, 1, 2)
    found.use_on_host(10, 1, 1)
    counts = found.on_host
    assert (counts.num_calls, counts.num_tokens, counts.nbytes) == (2, 3, 100)
    assert found.touched_bytes == found.loaded_bytes == 0
    found.forget()
    found.ask({1: {10: 4}})
    assert found.expected(2) == ()
    found.open(1)
    assert not found.is_on_host(10)


def test_the_hottest_on_the_host_had_better_have_a_slot() -> None:
    found = with_host()
    for _ in range(3):
        run(found, {1: (11, 13)})
    ask(found, FIRST)
    assert found.hottest_on_host() == (11,)
    found.open(1)
    assert found.hottest_on_host() == (11,)
    found.open(1, {11}.__contains__)
    assert found.hottest_on_host() == (13,)
    found.open(4)
    assert found.hottest_on_host() == ()


def test_the_most_used_takes_the_place_of_the_least_used() -> None:
    """If it is used much more: twice as often, and in one pass of eight."""
    found = routing()
    inside, outside = (10, 11, 14), (12, 13, 15)
    assert found.exchange(inside, outside) is None, "all are worth as much at first"
    for _ in range(30):
        run(found, {1: (10, 13), 2: (15,)})
    assert found.exchange(inside, outside) == (11, 13)
    assert found.exchange((10,), outside) is None
    assert found.exchange(inside, (12,)) is None
    assert found.exchange((), outside) is None
    assert found.exchange(inside, ()) is None
    for _ in range(30):
        run(found, {1: (10,), 2: (16,)})
    run(found, {1: (12,), 2: (16,)})
    assert found.exchange((11,), (12,)) is None, "once is not often"

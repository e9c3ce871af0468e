"""Experts are loaded as micro-batches choose them; all of them where nearly all are."""

from __future__ import annotations

from penstock.scheduler.slots.routing import ALWAYS, Routing

FIRST: dict[int, tuple[int, ...]] = {1: (10, 11, 12, 13), 2: (14, 15, 16, 17)}
SECOND: dict[int, tuple[int, ...]] = {4: (20, 21, 22, 23), 5: (24, 25, 26, 27)}


def routing() -> Routing:
    return Routing([FIRST, SECOND], [100] * 28)


def run(found: Routing, needs: dict[int, tuple[int, ...]]) -> None:
    """A micro-batch chooses, and runs window by window."""
    found.ask(needs)
    for site, units in needs.items():
        found.open(site)
        for unit in units:
            found.use(unit)
        found.withdraw(site, units)


def test_what_any_micro_batch_needs_is_expected_in_order() -> None:
    found = routing()
    assert found.expected(1) == ()
    found.ask({1: (13, 10), 2: (15,)})
    found.ask({1: (11, 10)})
    assert found.expected(1) == (10, 11, 13)
    assert found.asked_windows == {1, 2}
    found.withdraw(1, (13, 10))
    assert found.expected(1) == (10, 11), "another one still needs these"
    found.withdraw(1, (11, 10))
    found.withdraw(2, (15,))
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
    found.ask({1: (10, 11), 2: (14,)})
    found.ask({1: (12, 13), 2: (15, 16, 17)})
    for site in (1, 2):
        found.open(site)
        for units in ((10, 11), (12, 13)) if site == 1 else ((14,), (15, 16, 17)):
            found.withdraw(site, units)
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
    found.ask({1: (10,)})
    found.ask({1: (10, 11)})
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

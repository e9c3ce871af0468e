"""All ranks load the same units in the same order, and none waits for ever."""

from __future__ import annotations

import random

import pytest

from penstock.scheduler.ranks.load_order import Ask, LoadOrder

NUM_UNITS = 6


class Walker:
    """A rank that visits `sites` in turn and loads `ahead` of them in advance."""

    def __init__(self, rank: int, sites: list[int], ahead: int) -> None:
        self.rank = rank
        self.sites = sites
        self.ahead = ahead
        self.wanted: set[int] = set()
        self.there: set[int] = set()
        self.is_waiting = False
        self.has_left = False

    def step(self, order: LoadOrder) -> bool:
        """Goes on as far as one step. Returns False if it cannot, for now."""
        if self.has_left:
            return False
        if not self.sites:
            self.has_left = True
            for unit in self.wanted:
                order.hear(self.rank, Ask.DROP, unit)
            order.hear(self.rank, Ask.LEAVE, 0)
            return True
        for unit in self.sites[: 1 + self.ahead]:
            if unit not in self.wanted | self.there:
                self.wanted.add(unit)
                order.hear(self.rank, Ask.WANT, unit)
                return True
        if self.sites[0] in self.there:
            gone = self.sites.pop(0)
            if gone not in self.sites[: 1 + self.ahead]:
                self.there.remove(gone)
            self.is_waiting = False
            return True
        if not self.is_waiting:
            self.is_waiting = True
            order.hear(self.rank, Ask.NEED, self.sites[0])
            return True
        return False


def walk(walkers: list[Walker], seed: int) -> list[tuple[int, tuple[int, ...]]]:
    """All loads, until all have left."""
    dice = random.Random(seed)
    order = LoadOrder(len(walkers), NUM_UNITS)
    loads: list[tuple[int, tuple[int, ...]]] = []
    for _ in range(100_000):
        if order.is_over:
            return loads
        while (found := order.next()) is not None:
            loads.append(found)
            for rank in found[1]:
                one = walkers[rank]
                if found[0] in one.wanted:
                    one.wanted.remove(found[0])
                    one.there.add(found[0])
        able = (
            [one for one in walkers if one.step(order)] if dice.random() < 0.1 else []
        )
        if not able:
            dice.choice(walkers).step(order)
    raise AssertionError("somebody waits for ever")


@pytest.mark.parametrize("num_ranks", [2, 3, 4])
def test_ranks_with_the_same_passes_load_each_unit_once_a_pass(num_ranks: int) -> None:
    for seed in range(20):
        passes = [*range(NUM_UNITS)] * 4
        walkers = [Walker(rank, list(passes), seed % 3) for rank in range(num_ranks)]
        loads = walk(walkers, seed)
        assert [unit for unit, _ in loads] == passes
        assert {takers for _, takers in loads} == {tuple(range(num_ranks))}


def test_ranks_that_end_earlier_are_not_waited_for() -> None:
    for seed in range(20):
        walkers = [
            Walker(rank, [*range(NUM_UNITS)] * num, 1)
            for rank, num in enumerate((3, 0, 5))
        ]
        loads = walk(walkers, seed)
        assert [unit for unit, _ in loads] == [*range(NUM_UNITS)] * 5


def test_ranks_that_need_different_units_all_come_to_their_end() -> None:
    """In any order; with twice as many loads as without others at most."""
    for seed in range(200):
        dice = random.Random(seed)
        sites = [
            [dice.randrange(NUM_UNITS) for _ in range(dice.randrange(30))]
            for _ in range(dice.choice((2, 3, 4)))
        ]
        walkers = [Walker(rank, list(one), 2) for rank, one in enumerate(sites)]
        loads = walk(walkers, seed)
        assert len(loads) <= sum(map(len, sites))
        assert all(one.has_left for one in walkers)


def test_one_that_begins_a_pass_later_joins_at_its_beginning() -> None:
    """Else it would read each unit for itself, a few units behind."""
    order = LoadOrder(2, NUM_UNITS)
    order.hear(1, Ask.REST, 0)
    first = Walker(0, [*range(NUM_UNITS)] * 3, 1)
    loads = []
    late = Walker(1, [*range(NUM_UNITS)] * 2, 1)
    for step in range(1000):
        if step == 4:
            order.hear(1, Ask.WORK, 0)
        first.step(order)
        if step >= 4:
            late.step(order)
        while (found := order.next()) is not None:
            loads.append(found)
            for rank in found[1]:
                (first, late)[rank].wanted.remove(found[0])
                (first, late)[rank].there.add(found[0])
    alone = [unit for unit, takers in loads if takers == (0,)]
    both = [unit for unit, takers in loads if takers == (0, 1)]
    assert alone == [*range(NUM_UNITS)][: len(alone)]
    assert both[-NUM_UNITS:] == [*range(NUM_UNITS)]
    assert len(loads) <= 3 * NUM_UNITS + 2


def test_a_need_of_what_is_loaded_already_is_nothing() -> None:
    order = LoadOrder(1, NUM_UNITS)
    order.hear(0, Ask.WANT, 2)
    assert order.next() == (2, (0,))
    order.hear(0, Ask.NEED, 2)
    order.hear(0, Ask.REST, 0)
    assert order.next() is None
    order.hear(0, Ask.WANT, 3)
    assert order.next() is None  # it rests, and waits for nothing
    order.hear(0, Ask.NEED, 3)
    assert order.next() == (3, (0,))

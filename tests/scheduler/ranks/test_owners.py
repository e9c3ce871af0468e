"""Blocks are dealt to ranks in turn, and each rank has its share."""

from __future__ import annotations

import random

import pytest

from penstock.io.errors import UsageError
from penstock.scheduler.ranks.owners import deal, loads


def test_equal_blocks_are_dealt_in_turn() -> None:
    assert deal([(1.0, 1.0)] * 7, (0.0, 0.0), 2) == (0, 1, 0, 1, 0, 1, 0)
    owners = deal([(1.0, 1.0)] * 10, (0.0, 0.0), 3)
    assert owners[:4] == (0, 1, 2, 0) or owners[:3] == (0, 1, 2)


@pytest.mark.parametrize("num_ranks", [2, 3, 4, 8])
@pytest.mark.parametrize("seed", range(8))
def test_loads_differ_by_a_tenth_at_most(num_ranks: int, seed: int) -> None:
    """Of models with ten blocks a rank: some blocks are dense, some have experts."""
    rng = random.Random(seed)
    kinds = [(1.0, 1.0), (rng.uniform(1, 3), rng.uniform(0.5, 1.5))]
    num_dense = rng.randint(0, 3)
    blocks = [kinds[i >= num_dense] for i in range(10 * num_ranks + rng.randint(0, 9))]
    ends = (rng.uniform(0, 3), rng.uniform(0, 3))
    owners = deal(blocks, ends, num_ranks)
    for measure in zip(*loads(blocks, ends, owners, num_ranks), strict=True):
        assert max(measure) / (sum(measure) / num_ranks) <= 1.1


@pytest.mark.parametrize("num_ranks", [2, 3, 5])
@pytest.mark.parametrize("num", range(3, 14))
def test_the_first_rank_has_both_ends_and_each_has_some(
    num_ranks: int, num: int
) -> None:
    if num < num_ranks + 1:
        return
    for head in (0.0, 0.5, 2.0, 9.0):
        owners = deal([(1.0,)] * num, (head,), num_ranks)
        assert owners[0] == owners[-1] == 0
        assert set(owners) == set(range(num_ranks))


def test_a_large_head_counts_as_a_part_of_the_first_rank() -> None:
    owners = deal([(1.0,)] * 12, (4.0,), 2)
    assert owners.count(0) == 4


def test_too_few_blocks_are_refused() -> None:
    with pytest.raises(UsageError, match="at most 2 ranks"):
        deal([(1.0,)] * 3, (0.0,), 3)


def test_one_rank_has_all() -> None:
    assert deal([(1.0,)] * 3, (0.0,), 1) == (0, 0, 0)

"""The time of a pass that ranks share, against what can be said without stepping."""

from __future__ import annotations

import pytest

from penstock.scheduler.cost.pipeline import PassWork, WeightLoad
from penstock.scheduler.cost.ranked_pass import RANKS, Messages, RankStep, ranked_cost

FREE = Messages(1e18, 0.0, 0.0)
BLOCKS = 8


def work(compute: float, load: float, num: int = BLOCKS // 2) -> PassWork:
    loads = [[WeightLoad("disk", 10, load)] if load else []] * num
    seconds = [compute] * num
    return PassWork(seconds, loads, seconds, loads, 20, 1, 0.0)


def in_turn(num_ranks: int, blocks: int = BLOCKS) -> list[RankStep]:
    return [
        RankStep(block % num_ranks, 0, (block // num_ranks,)) for block in range(blocks)
    ]


@pytest.mark.parametrize("num", [2, 4, 16, 100])
def test_enough_micro_batches_hide_all_but_the_work_of_a_rank(num: int) -> None:
    found = ranked_cost([work(1.0, 0.1)], in_turn(2), FREE, num=num, hidden_bytes=0)
    assert found.steady == pytest.approx(4.0, rel=0.05)
    assert found.binds == "compute"


def test_with_one_micro_batch_ranks_take_turns() -> None:
    found = ranked_cost([work(1.0, 0.1)], in_turn(2), FREE, num=1, hidden_bytes=0)
    assert found.steady == pytest.approx(8.0)
    assert found.binds == RANKS


@pytest.mark.parametrize("num", [1, 2, 8])
def test_a_slow_link_of_each_rank_takes_its_own_bytes(num: int) -> None:
    found = ranked_cost([work(0.1, 1.0)], in_turn(2), FREE, num=num, hidden_bytes=0)
    assert found.steady == pytest.approx(4.0)
    assert found.binds == "disk"
    assert found.time.busy["disk"] == pytest.approx(4.0)


def test_messages_that_are_slow_are_hidden_by_more_micro_batches() -> None:
    slow = Messages(1e18, 0.25, 0.0)
    two = ranked_cost([work(1.0, 0.0)], in_turn(2), slow, num=2, hidden_bytes=0)
    many = ranked_cost([work(1.0, 0.0)], in_turn(2), slow, num=16, hidden_bytes=0)
    assert two.steady == pytest.approx(4.0 + 8 * 0.25)
    assert many.steady == pytest.approx(4.0, rel=0.1)


def test_hidden_states_take_their_bytes_over_the_network() -> None:
    """One micro-batch goes over it after each block."""
    slow = Messages(10.0, 0.0, 0.0)
    found = ranked_cost([work(1.0, 0.0)], in_turn(2), slow, num=1, hidden_bytes=5)
    assert found.steady == pytest.approx(8.0 + 8 * 0.5)


def test_calls_of_other_ranks_blocks_take_time() -> None:
    stubs = Messages(1e18, 0.0, 0.25)
    found = ranked_cost([work(1.0, 0.0)], in_turn(2), stubs, num=4, hidden_bytes=0)
    assert found.steady == pytest.approx(4.0 + 4 * 4 * 0.25, rel=0.1)


def test_a_rank_with_more_blocks_is_waited_for() -> None:
    steps = [
        RankStep(0, 0, (0,)),
        RankStep(1, 1, (0,)),
        RankStep(0, 0, (1,)),
        RankStep(0, 0, (2,)),
    ]
    works = [work(1.0, 0.0, 3), work(1.0, 0.0, 1)]
    found = ranked_cost(works, steps, FREE, num=8, hidden_bytes=0)
    assert found.steady == pytest.approx(3.0, rel=0.1)

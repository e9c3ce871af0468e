"""Who needs what, and who is served next: no rank waits for another for ever."""

from __future__ import annotations

import random

from penstock.scheduler.ranks.stages import (
    Address,
    CallState,
    LapPosition,
    RankStages,
    Waits,
    is_waited_for,
    servable,
)

OWNERS = (0, 0, 1, 0, 1, 0, 0)  # the embedding, five blocks, the head


def test_an_output_goes_to_the_next_stage_and_the_last_ones_to_all() -> None:
    stages = RankStages((0, 0, 1, 2, 0, 0), rank=0, has_head=True)
    assert stages.last_block == 4
    assert [stages.takers(s) for s in range(6)] == [
        (), (1,), (2,), (0,), (1, 2), (1, 2)
    ]  # fmt: skip
    headless = RankStages((0, 0, 1, 0), rank=1, has_head=False)
    assert headless.last_block == 3
    assert headless.takers(3) == (1,)


def test_calls_are_counted_alike_and_laps_begin_at_the_first_stage() -> None:
    state = CallState(2, 7)
    assert state.enter(0) == Address(2, 7, 0, 1)
    assert state.enter(1) == Address(2, 7, 0, 2)
    assert state.position == LapPosition(0, 1)
    assert state.count() == Address(2, 7, 0, 3)
    state.enter(0)
    assert state.position == LapPosition(1, 0)
    state.begin_again()
    assert state.count() == Address(2, 7, 1, 1)


def test_the_next_own_stage_may_be_in_the_next_lap() -> None:
    stages = RankStages(OWNERS, rank=1, has_head=True)
    assert stages.next_own(LapPosition(3, 1)) == LapPosition(3, 2)
    assert stages.next_own(LapPosition(3, 4)) == LapPosition(4, 2)


def test_the_lowest_position_is_served_first() -> None:
    here = [
        (LapPosition(1, 2), True),
        (LapPosition(0, 4), True),
        (LapPosition(0, 4), False),
    ]
    assert servable(Waits(here, [])) == {1, 2}
    assert servable(Waits(here, [LapPosition(0, 3)])) == frozenset()  # hold
    assert servable(Waits(here, [LapPosition(0, 4)])) == {1}  # a second site waits
    assert servable(Waits(here, [LapPosition(1, 0)])) == {1, 2}
    assert servable(Waits([], [LapPosition(1, 0)])) == frozenset()


def test_an_open_site_waits_only_for_those_that_come_to_it() -> None:
    at = LapPosition(1, 2)
    assert is_waited_for(at, Waits([], [at]))
    assert not is_waited_for(at, Waits([], [LapPosition(1, 3)]))
    assert not is_waited_for(at, Waits([], [at, LapPosition(0, 5)]))
    assert not is_waited_for(at, Waits([(LapPosition(0, 5), True)], [at]))


def test_ranks_that_serve_the_lowest_position_come_to_an_end() -> None:
    """A model of ranks that know of each other's progress late, as messages take time:
    in any order of deliveries all micro-batches get through all laps."""
    for seed in range(300):
        _play(random.Random(seed))


def _play(rng: random.Random) -> None:
    num_ranks = rng.randint(2, 4)
    num_stages = rng.randint(num_ranks + 1, 9)
    owners = [0, *(rng.randrange(num_ranks) for _ in range(num_stages - 2)), 0]
    owners[1 : num_ranks + 1] = range(num_ranks)
    stages = [
        RankStages(tuple(owners), rank, has_head=True) for rank in range(num_ranks)
    ]
    laps = {index: rng.randint(1, 3) for index in range(rng.randint(1, 4))}
    begins = {index: rng.randint(0, 1) for index in laps}
    true = {i: LapPosition(begins[i], 0) for i in laps}
    known = [dict(true) for _ in range(num_ranks)]  # what each rank has heard of
    late: list[tuple[int, int, LapPosition | None]] = []
    for _ in range(10_000):
        if not true and not late:
            return
        moves: list[tuple[str, int, int]] = [("hear", n, 0) for n in range(len(late))]
        for rank, view in enumerate(known):
            mine = [(i, p) for i, p in view.items() if owners[p.stage] == rank]
            coming = [
                stages[rank].next_own(p)
                for p in view.values()
                if owners[p.stage] != rank
            ]
            chosen = servable(Waits([(p, True) for _, p in mine], coming))
            moves += [("run", rank, mine[n][0]) for n in chosen]
        assert moves, "ranks wait for each other"
        what, number, index = rng.choice(moves)
        if what == "hear":
            rank, index, position = late.pop(number)
            if position is None:
                known[rank].pop(index, None)
            elif index in known[rank]:
                known[rank][index] = max(known[rank][index], position)
            continue
        at = true[index]
        after = LapPosition(at.lap, at.stage + 1)
        if after.stage == num_stages:
            after = LapPosition(at.lap + 1, 0)
        ended = after.lap - begins[index] >= laps[index]
        if ended:
            del true[index], known[number][index]
        else:
            true[index] = known[number][index] = after
        for rank in {*range(num_ranks)} - {number}:
            late.append((rank, index, None if ended else after))
    raise AssertionError("it does not end")

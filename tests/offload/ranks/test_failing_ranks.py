"""What goes wrong on one rank is said on all, and nobody waits for ever."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from deep_zoo import saved
from rank_threads import Ranks, none_failed, policy_of

import penstock
from penstock.io.errors import PenstockError, PolicyError, RanksError, UsageError
from penstock.offload.engine.ranking import room_of_each
from penstock.offload.ranks.joining import RankEnvironment
from penstock.offload.settings.memory_budget import MemoryRoom

NUM = 4


@pytest.fixture
def ranks(tmp_path: Path) -> Iterator[Ranks]:
    saved("llama", tmp_path, 5)
    io = {"reader": "threads", "cache": tmp_path / "cache"}
    with Ranks(tmp_path, 2, policy_of("600KiB", io=io)) as found:
        yield found


def _given(num: int = NUM) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(2)
    return [torch.randint(8, 60, (1, 5), generator=generator) for _ in range(num)]


def _run(ranks: Ranks, fn: Any, batches: Any = None) -> list[list[Any]]:
    """`fn(rank, model, place, ids)` for each micro-batch, by rank."""

    def work(rank: int, model: Any) -> list[Any]:
        given = list(enumerate(_given() if batches is None else batches(rank)))
        with penstock.sweep(model, seed=1, width=3) as sweep:
            return sweep.map(
                lambda one: fn(rank, model, *one), given, return_exceptions=True
            )

    return ranks.run(work)


def test_a_users_error_on_one_rank_fails_that_micro_batch_on_all(ranks: Ranks) -> None:
    def fn(rank: int, model: Any, place: int, ids: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = model(ids).logits
        if rank == 1 and place == 1:
            raise ValueError("only here")
        return model(ids).logits if place != 2 else logits

    for rank, found in enumerate(none_failed(_run(ranks, fn))):
        assert [isinstance(one, torch.Tensor) for one in found] == [1, 0, 1, 1]
        if rank == 0:
            assert "micro-batch 1 failed on rank 1: ValueError: only here" in str(
                found[1]
            )
        else:
            assert isinstance(found[1], ValueError)


def test_an_error_after_the_last_call_fails_it_on_all_too(ranks: Ranks) -> None:
    def fn(rank: int, model: Any, place: int, ids: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = model(ids).logits
        if rank == 1 and place == 3:
            raise ValueError("only here")
        return logits

    found = none_failed(_run(ranks, fn))
    assert "on rank 1: ValueError: only here" in str(found[0][3])


def test_an_error_in_a_block_is_raised_at_the_same_call_of_all_ranks(
    ranks: Ranks,
) -> None:
    """So a function that tries again does so on all of them."""
    model = ranks.models[1]
    calls = []

    def fail_once(module: Any, args: Any, output: Any) -> None:
        calls.append(1)
        if len(calls) == 2:
            raise RuntimeError("a card fell out")

    handle = model.model.layers[1].mlp.register_forward_hook(fail_once)

    def fn(rank: int, model: Any, place: int, ids: torch.Tensor) -> Any:
        try:
            return 0, model(ids).logits
        except RuntimeError as error:
            return 1 + ("a card fell out" not in str(error)), model(ids).logits

    found = none_failed(_run(ranks, fn))
    handle.remove()
    tries = [[num for num, _ in one] for one in found]
    assert tries[0] == tries[1]
    assert sorted(tries[0]) == [0, 0, 0, 1]
    for one, other in zip(*found, strict=True):
        assert torch.equal(one[1], other[1])


def test_bad_ids_are_the_same_error_on_all_ranks(ranks: Ranks) -> None:
    def fn(rank: int, model: Any, place: int, ids: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = model(ids + 100_000 * (place == 2)).logits
        return logits

    for found in none_failed(_run(ranks, fn)):
        assert [isinstance(one, Exception) for one in found] == [0, 0, 1, 0]
        assert "index out of range" in str(found[2])


def test_ranks_that_run_other_functions_say_so(ranks: Ranks) -> None:
    def fn(rank: int, model: Any, place: int, ids: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = model(ids).logits
        return model(ids).logits if rank == 0 and place == 1 else logits

    found = _run(ranks, fn)
    assert all(isinstance(one, RanksError) for one in found)
    assert any("run different things" in str(one) for one in found)


def test_ranks_that_have_other_batches_say_so(ranks: Ranks) -> None:
    def fn(rank: int, model: Any, place: int, ids: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = model(ids).logits
        return logits

    found = _run(ranks, fn, lambda rank: [ids + rank for ids in _given()])
    assert all(isinstance(one, RanksError) for one in found)
    assert any("other token ids" in str(one) for one in found)


@pytest.mark.parametrize("fewer", [0, 1])
def test_a_rank_with_fewer_batches_says_so(fewer: int, ranks: Ranks) -> None:
    def fn(rank: int, model: Any, place: int, ids: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = model(ids).logits
        return logits

    found = _run(ranks, fn, lambda rank: _given(NUM - (rank == fewer)))
    assert isinstance(found[1], RanksError)
    assert "more batches" in str(found[1])
    if fewer == 1:  # the first rank waits for it, and is not done before
        assert isinstance(found[0], RanksError)


def test_a_rank_that_is_killed_ends_the_others(ranks: Ranks) -> None:
    def fn(rank: int, model: Any, place: int, ids: torch.Tensor) -> torch.Tensor:
        if rank == 1 and place == 2:
            ranks.office.kill(1)
            raise KeyboardInterrupt
        logits: torch.Tensor = model(ids).logits
        return logits

    found = _run(ranks, fn)
    assert isinstance(found[0], RanksError)
    assert "rank 1 is gone" in str(found[0])


def test_a_rank_that_leaves_the_sweep_ends_it_for_all(ranks: Ranks) -> None:
    def work(rank: int, model: Any) -> list[Any]:
        with penstock.sweep(model, seed=1, width=2) as sweep:
            for outcome in sweep.run(lambda ids: model(ids).logits, _given()):
                if rank == 1 and outcome.index == 0:
                    raise ValueError("enough")
        return []

    found = ranks.run(work)
    assert isinstance(found[1], ValueError)
    assert isinstance(found[0], RanksError)
    assert "rank 1 has left the sweep" in str(found[0])


def test_after_a_failed_sweep_the_next_one_is_right(ranks: Ranks) -> None:
    test_a_users_error_on_one_rank_fails_that_micro_batch_on_all(ranks)

    def fn(rank: int, model: Any, place: int, ids: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = model(ids).logits
        return logits

    found = none_failed(_run(ranks, fn))
    assert all(map(torch.equal, *found))


def test_plain_calls_are_shared_too(ranks: Ranks) -> None:
    (ids,) = _given(1)
    found = none_failed(ranks.run(lambda rank, model: model(ids).logits))
    assert torch.equal(*found)
    swept = none_failed(_run(ranks, lambda r, model, p, ids: model(ids).logits))
    assert torch.equal(swept[0][0], found[0])


def test_what_is_on_another_rank_cannot_be_used_directly(ranks: Ranks) -> None:
    with pytest.raises(PenstockError, match="is on another rank"):
        ranks.models[0].model.layers[1].mlp.gate_proj.weight.sum()
    with pytest.raises(UsageError, match="output_hidden_states is not there"):
        ranks.models[0](_given(1)[0], output_hidden_states=True)


def test_ranks_exclude_what_they_cannot_do() -> None:
    with pytest.raises(PolicyError, match="ranks: pipeline excludes compile"):
        penstock.Policy(ranks="pipeline", compile=True)


def test_ranks_of_a_machine_divide_what_is_free_there() -> None:
    room = MemoryRoom(total=1000, runtime=200)
    assert room_of_each(room, 4) == MemoryRoom(total=400, runtime=200)
    assert room_of_each(room, 1) == room
    asked = MemoryRoom(total=1000, runtime=200, is_asked=True)
    assert room_of_each(asked, 4) == asked


def test_the_environment_of_torchrun_is_checked() -> None:
    given = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "a", "MASTER_PORT": "1"}
    assert RankEnvironment.of(given) == RankEnvironment(1, 2, "a", 1)
    assert RankEnvironment.of({"LANG": "C"}).is_alone
    with pytest.raises(UsageError, match="and not RANK, WORLD_SIZE"):
        RankEnvironment.of({"MASTER_ADDR": "a", "MASTER_PORT": "1"})
    with pytest.raises(UsageError, match="RANK is 2, and WORLD_SIZE 2"):
        RankEnvironment.of({**given, "RANK": "2"})
    with pytest.raises(UsageError, match="are numbers"):
        RankEnvironment.of({**given, "MASTER_PORT": "x"})

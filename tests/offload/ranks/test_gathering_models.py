"""Models whose ranks gather weights give what one process gives, bit for bit."""

from __future__ import annotations

import random
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from deep_zoo import saved
from gather_threads import GatherRanks, gather_policy, given, score

import penstock
import zoo
from penstock.io.errors import (
    DoesNotFitError,
    PenstockError,
    PolicyError,
    RanksError,
    UsageError,
)
from shares import shared

BLOCK = 4096
NOT_STREAMED = ("rwkv_rescaled",)
"""Its code writes to weights."""
NAMES = [name for name in sorted(zoo.ARCHITECTURES) if name not in NOT_STREAMED]
USUAL = ("llama", "gpt2", "mixtral", "t5", "bert", "mamba")


@pytest.mark.parametrize("name", shared(NAMES, lambda _, one: one in USUAL))
def test_ranks_with_rows_of_their_own_give_what_the_resident_model_gives(
    name: str, tmp_path: Path
) -> None:
    """One with fewer micro-batches; any model that one process can stream."""
    torch.set_num_threads(1)
    resident = saved(name, tmp_path)
    batches = [
        [zoo.inputs(name, seed=10 * rank + n) for n in range(num)]
        for rank, num in enumerate((3, 1))
    ]
    with torch.no_grad():
        wanted = [[resident(**one)[0] for one in part] for part in batches]

    def work(rank: int, model: Any) -> list[Any]:
        with torch.no_grad(), penstock.sweep(model, seed=1, width=2) as sweep:
            return sweep.map(lambda one: model(**one)[0], batches[rank])

    policy = gather_policy(tmp_path, _least(tmp_path))
    for rank, found in enumerate(
        none_failed(GatherRanks(tmp_path, 2, policy).run(work))
    ):
        assert len(found) == len(wanted[rank])
        assert all(map(torch.equal, found, wanted[rank]))


def _least(folder: Path) -> str:
    """A working set that is about as small as the model allows."""
    memory = 64 << 10
    while True:
        policy = gather_policy(folder, f"{memory}").model_copy(update={"ranks": None})
        try:
            with penstock.load(folder, policy):
                return f"{memory}"
        except DoesNotFitError:
            memory = memory * 5 // 4


def none_failed(found: list[Any]) -> list[Any]:
    for one in found:
        if isinstance(one, BaseException):
            raise one
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("llama")
    torch.set_num_threads(1)
    saved("llama", path, 5)
    return path


def alone(folder: Path, batches: list[torch.Tensor]) -> tuple[list[torch.Tensor], int]:
    """What one process makes of them, and the bytes that it reads."""
    policy = gather_policy(folder, "250KiB", gather_rows=1 << 30)
    with penstock.load(folder, policy.model_copy(update={"ranks": None})) as model:
        return score(model, batches), penstock.statistics(model).bytes_read["disk"]


@pytest.mark.parametrize("num_ranks", [2, 3])
def test_each_rank_reads_its_part_of_what_one_process_reads(
    num_ranks: int, folder: Path
) -> None:
    """Up to one block of 4096 bytes a unit and load."""
    wanted, nbytes = alone(folder, given(0, 6))
    policy = gather_policy(folder, "250KiB", gather_rows=1 << 30)
    ranks = GatherRanks(folder, num_ranks, policy)
    found = none_failed(ranks.run(lambda rank, model: score(model, given(rank, 6))))
    assert all(map(torch.equal, found[0], wanted))
    for rank in range(num_ranks):
        num_loads = ranks.engines[rank]._tiers.loaders[0].statistics().num_loads
        assert abs(ranks.read(rank) - nbytes / num_ranks) <= num_loads * BLOCK
        statistics = ranks.engines[rank].statistics().ranks
        assert statistics.num_ranks == num_ranks
        assert statistics.bytes_sent > nbytes / num_ranks / 2


def test_uneven_numbers_of_micro_batches_hang_nowhere(folder: Path) -> None:
    """Whether they are scored in one sweep, in several, or by plain calls."""
    wanted = [alone(folder, given(rank, 9))[0] for rank in range(3)]
    for seed in range(8):
        dice = random.Random(seed)
        nums = [dice.choice((0, 1, 3, 9)) for _ in range(dice.choice((2, 3)))]
        cuts = [dice.choice((2, 9)) for _ in nums]
        policy = gather_policy(folder, "250KiB", gather_rows=1 << 30)

        def work(rank: int, model: Any, nums: Any = nums, cuts: Any = cuts) -> Any:
            batches, found = given(rank, 9)[: nums[rank]], []
            for start in range(0, len(batches), cuts[rank]):
                part = batches[start : start + cuts[rank]]
                if rank == 1 and len(part) == 1:
                    with torch.no_grad():
                        found.append(model(part[0]).logits)
                else:
                    found += score(model, part)
            return found

        ranks = GatherRanks(folder, len(nums), policy, seed)
        for rank, found in enumerate(none_failed(ranks.run(work))):
            assert len(found) == nums[rank]
            assert all(map(torch.equal, found, wanted[rank]))


def test_completions_of_uneven_length_are_those_of_one_process(folder: Path) -> None:
    def complete(rank: int, model: Any) -> list[Any]:
        def fn(place: int) -> Any:
            num = 2 + 3 * rank + place
            ids = given(rank, 3)[place]
            return model.generate(ids, max_new_tokens=num, do_sample=False).tolist()

        with penstock.sweep(model, seed=1) as sweep:
            return sweep.map(fn, range(3))

    policy = gather_policy(folder, "250KiB")
    with penstock.load(folder, policy.model_copy(update={"ranks": None})) as model:
        wanted = [complete(rank, model) for rank in range(2)]
    assert none_failed(GatherRanks(folder, 2, policy).run(complete)) == wanted


def test_the_rank_with_the_least_memory_decides(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else ranks would load other units, and not the same ones."""
    from penstock.offload import model as model_module
    from penstock.offload.settings.memory_budget import MemoryRoom

    rooms = iter([90 << 20, 60 << 20])
    lock = threading.Lock()

    def room_for(*_: Any) -> MemoryRoom:
        with lock:
            return MemoryRoom(total=next(rooms), runtime=0, is_asked=True)

    monkeypatch.setattr(model_module, "room_for", room_for)
    policy = gather_policy(folder).with_settings(["device_memory=auto"])
    ranks = GatherRanks(folder, 2, policy)
    none_failed(ranks.run(lambda rank, model: score(model, given(rank, 2))))
    budgets = [ranks.engines[rank].budget for rank in range(2)]
    assert budgets[0] == budgets[1]
    assert budgets[0].total == 60 << 20


def test_ranks_with_other_policies_are_refused(folder: Path) -> None:
    one, other = gather_policy(folder), gather_policy(folder, "300KiB")
    found = GatherRanks(folder, 2, [one, other]).run(lambda rank, model: None)
    assert isinstance(found[1], UsageError)
    assert "rank 1 has not the same as the first rank: device_memory" in str(found[1])
    assert isinstance(found[0], RanksError)
    assert "rank 1 has failed: rank 1 has not the same" in str(found[0])


def test_an_error_on_one_rank_leaves_the_others_their_rows(folder: Path) -> None:
    def work(rank: int, model: Any) -> list[Any]:
        found = score(model, given(rank, 4))
        if rank == 0:
            raise ValueError("only here")
        return found + score(model, given(rank, 4))

    found = GatherRanks(folder, 2, gather_policy(folder, "250KiB")).run(work)
    assert isinstance(found[0], ValueError)
    assert len(found[1]) == 8


def test_what_ranks_that_gather_cannot_do_is_said(folder: Path) -> None:
    with pytest.raises(PolicyError, match="ranks: gather excludes host_memory"):
        penstock.Policy(ranks="gather", host_memory="1GiB")
    with pytest.raises(PolicyError, match="ranks: gather excludes device"):
        penstock.Policy(ranks="gather", device="cuda")
    ranks = GatherRanks(folder, 2, gather_policy(folder))

    def change(rank: int, model: Any) -> None:
        penstock.update(model, {"lm_head.weight": model.lm_head.weight * 2})

    for error in ranks.run(change):
        assert isinstance(error, PenstockError)
        assert "other ranks read a part of it" in str(error)

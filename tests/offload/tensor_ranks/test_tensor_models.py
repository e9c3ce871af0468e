"""Ranks that divide each matrix product give what one process gives, bit for bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from deep_zoo import saved
from gather_threads import GatherRanks, given

import penstock
import zoo
from penstock.io.errors import PenstockError, PolicyError, RanksError
from penstock.offload.engine.groups import Forwards
from penstock.offload.policy import Policy
from penstock.offload.tensor_ranks.row_cuts import bounds_of
from penstock.offload.tensor_ranks.row_exchange import RowExchange

NAMES = ("llama", "qwen3", "gpt2", "opt", "gemma3_text")
READS_WEIGHTS = "mamba"
"""Its code multiplies with the weight of a layer itself."""


def tensor_policy(folder: Path, memory: str = "2MiB", **values: Any) -> Policy:
    io = {"reader": "threads", "cache": folder / "cache", "direct": False}
    return Policy(**{"device_memory": memory, "ranks": "tensor", "io": io, **values})


def none_failed(found: list[Any]) -> list[Any]:
    for one in found:
        if isinstance(one, BaseException):
            raise one
    return found


@pytest.mark.parametrize("num_ranks", [2, 3])
@pytest.mark.parametrize("name", NAMES)
def test_ranks_give_what_the_resident_model_gives(
    name: str, num_ranks: int, tmp_path: Path
) -> None:
    """Scores bit for bit, and tokens; every rank has all of them."""
    torch.set_num_threads(1)
    resident = saved(name, tmp_path, 4)
    batches = [zoo.inputs(name, seed=seed) for seed in range(5)]
    options: dict[str, Any] = {"max_new_tokens": 3, "do_sample": False}
    with torch.no_grad():
        wanted = [resident(**one)[0] for one in batches]
        tokens = [resident.generate(**one, **options) for one in batches]

    def work(rank: int, model: Any) -> Any:
        with torch.no_grad(), penstock.sweep(model, seed=1, width=3) as sweep:
            logits = sweep.map(lambda one: model(**one)[0], batches)
        with penstock.sweep(model, seed=1) as sweep:
            found = sweep.map(lambda one: model.generate(**one, **options), batches)
        with torch.no_grad():  # outside of a sweep
            logits.append(model(**batches[0])[0])
        return logits, found, penstock.statistics(model).ranks

    ranks = GatherRanks(tmp_path, num_ranks, tensor_policy(tmp_path))
    for logits, found, statistics in none_failed(ranks.run(work)):
        assert all(map(torch.equal, logits, [*wanted, wanted[0]]))
        assert all(map(torch.equal, found, tokens))
        assert statistics.num_ranks == num_ranks
        assert statistics.num_gathers > 0
        assert statistics.num_sent == statistics.num_gathers * (num_ranks - 1)


def test_a_layer_whose_weight_the_models_code_reads_is_whole(tmp_path: Path) -> None:
    torch.set_num_threads(1)
    resident = saved(READS_WEIGHTS, tmp_path, 2)
    given = zoo.inputs(READS_WEIGHTS)
    with torch.no_grad():
        wanted = resident(**given)[0]

    def work(rank: int, model: Any) -> Any:
        with torch.no_grad():
            found = model(**given)[0]
        return found, {one.name for one in model_forwards(model).exchange.layers}

    policy = tensor_policy(tmp_path)
    for found, names in none_failed(GatherRanks(tmp_path, 2, policy).run(work)):
        assert found.equal(wanted)
        assert names
        assert not any(name.endswith("dt_proj") for name in names)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("llama")
    torch.set_num_threads(1)
    saved("llama", path, 5)
    return path


def score(model: Any, batches: Any, coalesce: bool | None = None) -> list[Any]:
    with torch.no_grad():
        sweep = penstock.sweep(model, seed=1, width=3, coalesce=coalesce)
        with sweep:
            return sweep.map(lambda ids: model(ids).logits, batches)


@pytest.mark.parametrize("num_ranks", [2, 3])
def test_a_rank_streams_its_rows_of_each_product(num_ranks: int, folder: Path) -> None:
    """Exactly; layers that are too small are whole on each rank."""
    policy = tensor_policy(folder, "600KiB")
    with penstock.load(folder, policy.model_copy(update={"ranks": None})) as model:
        sizes = {name: one.nbytes for name, one in model.named_parameters()}
        whole = penstock.statistics(model).model_bytes

    def work(rank: int, model: Any) -> tuple[Any, int, int]:
        forwards: Forwards = model_forwards(model)
        exchange = forwards.exchange
        assert isinstance(exchange, RowExchange)
        cut = {f"{one.name}.weight" for one in exchange.layers}
        mine = sum(one.recipes[f"{one.name}.weight"].nbytes for one in exchange.layers)
        score(model, given(0, 3))
        return cut, mine, penstock.statistics(model).model_bytes

    found = none_failed(GatherRanks(folder, num_ranks, policy).run(work))
    names = found[0][0]
    assert {name.rpartition(".")[0].rpartition(".")[2] for name in names} >= {
        "gate_proj", "up_proj", "down_proj",
    }  # fmt: skip
    divided = sum(sizes[name] for name in names)
    assert sum(mine for _, mine, _ in found) == divided
    for _, mine, nbytes in found:
        assert nbytes == whole - divided + mine
        assert mine < divided * 0.55 if num_ranks == 2 else divided * 0.45


def model_forwards(model: Any) -> Any:
    from penstock.offload.model import engine_of

    return engine_of(model)._forwards


def test_joint_products_are_made_in_the_same_order_on_all_ranks(folder: Path) -> None:
    batches = given(0, 9)
    policy = tensor_policy(folder, "600KiB", coalesce="on")
    with penstock.load(folder, policy.model_copy(update={"ranks": None})) as model:
        wanted = score(model, batches, True)
    for seed in range(3):
        ranks = GatherRanks(folder, 2, policy, seed)
        for found in none_failed(ranks.run(lambda _, one: score(one, batches, True))):
            assert all(map(torch.allclose, found, wanted))


def test_ranks_that_run_different_things_say_so(folder: Path) -> None:
    """Neither a hang nor numbers of other tokens."""

    def other(rank: int, model: Any) -> Any:
        return score(model, given(0, 3 + rank))

    def longer(rank: int, model: Any) -> Any:
        return score(model, [ids[:, : 5 - rank] for ids in given(0, 3)])

    def users_error(rank: int, model: Any) -> Any:
        def fn(ids: torch.Tensor) -> Any:
            if rank == 1:
                raise ValueError("only here")
            return model(ids).logits

        with torch.no_grad(), penstock.sweep(model, seed=1, width=3) as sweep:
            return sweep.map(fn, given(0, 3))

    for work in (other, longer, users_error):
        found = GatherRanks(folder, 2, tensor_policy(folder, "600KiB")).run(work)
        errors = [one for one in found if isinstance(one, BaseException)]
        assert errors, work
        assert any(isinstance(one, RanksError) for one in errors), (work, errors)


def test_an_error_that_all_ranks_have_fails_its_micro_batch_only(folder: Path) -> None:
    batches = given(0, 4)
    bad = [*batches[:2], torch.tensor([[1 << 20]]), *batches[2:]]

    def work(rank: int, model: Any) -> list[Any]:
        with torch.no_grad(), penstock.sweep(model, seed=1, width=3) as sweep:
            outcomes = sweep.run(lambda ids: model(ids).logits, bad)
            return sorted(outcomes, key=lambda one: one.index)

    policy = tensor_policy(folder, "600KiB")
    with penstock.load(folder, policy.model_copy(update={"ranks": None})) as model:
        wanted = score(model, batches)
    for found in none_failed(GatherRanks(folder, 2, policy).run(work)):
        assert [one.error is not None for one in found] == [0, 0, 1, 0, 0]
        good = [one.value for one in found if one.error is None]
        assert all(map(torch.equal, good, wanted))


def test_a_rank_that_is_killed_ends_the_others(folder: Path) -> None:
    ranks = GatherRanks(folder, 3, tensor_policy(folder, "600KiB"))

    def work(rank: int, model: Any) -> Any:
        def fn(ids: torch.Tensor) -> Any:
            if rank == 1 and ids.equal(given(0, 4)[2]):
                ranks.office.kill(1)
                raise SystemExit
            return model(ids).logits

        with torch.no_grad(), penstock.sweep(model, seed=1, width=1) as sweep:
            return sweep.map(fn, given(0, 4))

    found = ranks.run(work)
    for rank in (0, 2):
        assert isinstance(found[rank], RanksError)
        assert "rank 1 is gone" in str(found[rank])


def test_what_ranks_cannot_divide_is_said(tmp_path: Path, folder: Path) -> None:
    with pytest.raises(PolicyError, match="ranks: tensor excludes adapter"):
        penstock.Policy(ranks="tensor", adapter=tmp_path)
    with pytest.raises(PolicyError, match="ranks: tensor excludes device"):
        penstock.Policy(ranks="tensor", device="cuda")

    def change(rank: int, model: Any) -> None:
        penstock.update(model, {"lm_head.weight": model.lm_head.weight * 2})

    for error in GatherRanks(folder, 2, tensor_policy(folder)).run(change):
        assert isinstance(error, PenstockError)
        assert "rows of its own" in str(error)


def test_parts_begin_at_multiples_of_eight_rows_and_have_sixteen() -> None:
    assert bounds_of(64, 2) == [(0, 32), (32, 64)]
    assert bounds_of(100, 3) == [(0, 32), (32, 64), (64, 100)]
    assert bounds_of(31, 2) is None
    assert bounds_of(256, 3, 128) is None
    for num in (40, 64, 96, 111, 1000):
        for num_ranks in (2, 3, 5):
            bounds = bounds_of(num, num_ranks)
            if bounds is None:
                assert num < num_ranks * 24
                continue
            assert bounds[0][0] == 0
            assert bounds[-1][1] == num
            assert all(low % 8 == 0 and high - low >= 16 for low, high in bounds)

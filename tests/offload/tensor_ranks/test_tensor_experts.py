"""Ranks that divide stacked experts give what one process gives, bit for bit."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from deep_zoo import saved
from gather_threads import GatherRanks
from moe_models import GREEDY, batches, checkpoint, expert_bytes, resident
from safetensors.torch import load_file
from test_tensor_models import model_forwards, none_failed, tensor_policy

import penstock
import zoo
from penstock.io.checkpoint.index import SINGLE_FILE
from penstock.io.errors import UsageError
from penstock.offload.model import engine_of
from penstock.offload.tensor_ranks.cut_experts import (
    expert_bounds,
    first_held,
    held_by_each,
)
from quantised import dequantised, fp4_of, fp8_of, fp8_section, original, quantised

NAMES = ("mixtral", "qwen3_moe", "deepseek_v3", "gpt_oss", "llama4_text")
WHOLE, IN_PIECES = "2MiB", "200KiB"
"""Room for the experts of all layers, and for a few of them."""


@pytest.mark.slow
@pytest.mark.parametrize("memory", [WHOLE, IN_PIECES])
@pytest.mark.parametrize("num_ranks", [2, 3])
@pytest.mark.parametrize("name", NAMES)
def test_ranks_give_what_the_resident_model_gives(
    name: str, num_ranks: int, memory: str, tmp_path: Path
) -> None:
    """Scores bit for bit, and tokens; every rank has all of them."""
    torch.set_num_threads(1)
    whole = saved(name, tmp_path, 4)
    given = [zoo.inputs(name, seed=seed) for seed in range(4)]
    options: dict[str, Any] = {"max_new_tokens": 3, "do_sample": False}
    with torch.no_grad():
        wanted = [whole(**one)[0] for one in given]
        tokens = [whole.generate(**one, **options) for one in given]

    def work(rank: int, model: Any) -> Any:
        with torch.no_grad():  # outside of a sweep
            alone = model(**given[0])[0]
        num_gathers = penstock.statistics(model).ranks.num_gathers
        with torch.no_grad(), penstock.sweep(model, seed=1, width=3) as sweep:
            logits = sweep.map(lambda one: model(**one)[0], given)
        with penstock.sweep(model, seed=1) as sweep:
            made = sweep.map(lambda one: model.generate(**one, **options), given)
        exchange = model_forwards(model).exchange
        assert num_gathers == len(exchange.layers) + len(exchange.experts)
        assert bool(engine_of(model).model_division.stacks) == (memory == IN_PIECES)
        return [alone, *logits], made, penstock.statistics(model)

    ranks = GatherRanks(tmp_path, num_ranks, tensor_policy(tmp_path, memory))
    for logits, made, statistics in none_failed(ranks.run(work)):
        assert all(map(torch.equal, logits, [wanted[0], *wanted]))
        assert all(map(torch.equal, made, tokens))
        assert not statistics.faults
        assert "" not in statistics.fallbacks
        found = statistics.ranks
        assert found.num_sent == found.num_gathers * (num_ranks - 1)
        uneven = [one for one in statistics.fallbacks if "evenly" in one]
        assert len(uneven) == (num_ranks == 3)


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe", "deepseek_v3"])
def test_each_of_two_ranks_reads_half_of_the_experts(name: str, tmp_path: Path) -> None:
    torch.set_num_threads(1)
    whole = saved(name, tmp_path, 4)
    sizes = {key: one.nbytes for key, one in whole.named_parameters()}
    of_experts = sum(size for key, size in sizes.items() if ".experts." in key)
    alone = tensor_policy(tmp_path, WHOLE).model_copy(update={"ranks": None})
    with penstock.load(tmp_path, alone) as model:
        model_bytes = penstock.statistics(model).model_bytes

    def work(rank: int, model: Any) -> Any:
        with torch.no_grad():
            model(**zoo.inputs(name))
        exchange = model_forwards(model).exchange
        parts = [one.recipes for one in (*exchange.layers, *exchange.experts)]
        recipes = {key: one for part in parts for key, one in part.items()}
        return recipes, penstock.statistics(model)

    ranks = GatherRanks(tmp_path, 2, tensor_policy(tmp_path, WHOLE))
    for recipes, statistics in none_failed(ranks.run(work)):
        own = {key: one.nbytes for key, one in recipes.items() if ".experts." in key}
        assert 2 * sum(own.values()) == of_experts
        divided = sum(sizes[key] for key in recipes)
        mine = sum(one.nbytes for one in recipes.values())
        assert statistics.bytes_loaded == model_bytes - divided + mine
        assert statistics.model_bytes == statistics.bytes_loaded


@pytest.mark.parametrize("name", ["qwen3_moe", "deepseek_v3"])
def test_a_rank_loads_those_of_its_experts_that_are_chosen(
    name: str, tmp_path: Path
) -> None:
    """Piece by piece, where its part does not fit."""
    torch.set_num_threads(1)
    whole, folder = resident(name, torch.float32), checkpoint(tmp_path, name)
    whole.set_experts_implementation("grouped_mm")  # other tests take others
    (ids,) = batches(1, size=1, length=2)
    chosen: list[list[int]] = []

    def note(module: Any, args: Any) -> None:
        chosen.append(args[1].flatten().tolist())

    modules = whole.named_modules()
    experts = [module for key, module in modules if key.endswith(".experts")]
    kept = [module.register_forward_pre_hook(note) for module in experts]
    with torch.no_grad():
        wanted = whole(**ids).logits
    for handle in kept:
        handle.remove()

    def work(rank: int, model: Any) -> Any:
        with torch.no_grad():
            return model(**ids).logits, penstock.statistics(model)

    policy = tensor_policy(tmp_path, "600KiB")
    found = none_failed(GatherRanks(folder, 2, policy).run(work))
    for rank, (logits, statistics) in enumerate(found):
        mine = {*range(8 * rank, 8 * rank + 8)}
        num_chosen = sum(len(mine & {*one}) for one in chosen)
        assert num_chosen < 8 * len(chosen)
        assert torch.equal(logits, wanted)
        assert statistics.expert_bytes_touched == num_chosen * expert_bytes(whole)


@pytest.mark.slow
@pytest.mark.parametrize("num_ranks", [2, 3])
@pytest.mark.parametrize("way", ["eager", "batched_mm"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_all_ways_of_transformers_give_their_bits(
    way: str, num_ranks: int, dtype: torch.dtype, tmp_path: Path
) -> None:
    torch.set_num_threads(1)
    folder = checkpoint(tmp_path, "qwen3_moe", dtype)
    one = penstock.load(folder, penstock.Policy(device_memory="8MiB"))
    with one as model, torch.no_grad():
        model.set_experts_implementation(way)
        wanted = [model(**given).logits for given in batches(3)]
        tokens = [model.generate(**given, **GREEDY) for given in batches(3)]

    def work(rank: int, model: Any) -> Any:
        model.set_experts_implementation(way)
        with torch.no_grad(), penstock.sweep(model, coalesce=False) as sweep:
            logits = sweep.map(lambda given: model(**given).logits, batches(3))
        with penstock.sweep(model, coalesce=True) as sweep:
            return logits, sweep.map(
                lambda given: model.generate(**given, **GREEDY), batches(3)
            )

    policy = tensor_policy(tmp_path, "8MiB")
    for logits, made in none_failed(GatherRanks(folder, num_ranks, policy).run(work)):
        assert all(map(torch.equal, logits, wanted))
        if dtype is torch.float32:
            assert all(map(torch.equal, made, tokens))


def stacked_of(name: str, weight: torch.Tensor) -> dict[str, torch.Tensor]:
    """MXFP4, as gpt-oss has it: transposed, and only the experts."""
    if ".experts." not in name:
        return {name: weight}
    numbers, exponents = fp4_of(weight.transpose(1, 2))
    return {f"{name}_blocks": numbers, f"{name}_scales": exponents}


def blocks_of(name: str, weight: torch.Tensor) -> dict[str, torch.Tensor]:
    numbers, scales = fp8_of(weight, (32, 16))
    return {name: numbers, f"{name}_scale_inv": scales}


@pytest.mark.parametrize(
    ("name", "change", "section", "memory"),
    [
        ("gpt_oss", stacked_of, {"quant_method": "mxfp4"}, "160KiB"),
        ("qwen3_moe", blocks_of, fp8_section((32, 16)), "80KiB"),
    ],
)
def test_quantised_experts_are_read_in_parts(
    name: str, change: Callable[..., Any], section: Any, memory: str, tmp_path: Path
) -> None:
    pytest.importorskip("accelerate", reason="transformers dequantises FP8 with it")
    torch.set_num_threads(1)
    source = original(tmp_path / "original", name)
    folder = quantised(source, tmp_path / "quantised", change, section)
    whole: Any = dequantised(folder)
    ids = torch.arange(14).view(2, 7) + 3
    with torch.no_grad():
        wanted = whole(ids).logits

    def work(rank: int, model: Any) -> Any:
        with torch.no_grad():
            return model(ids).logits, penstock.statistics(model)

    policy = tensor_policy(tmp_path, memory, resident_below=1)
    stored = load_file(folder / SINGLE_FILE).items()
    nbytes = sum(one.nbytes for key, one in stored if ".experts." in key)
    for logits, statistics in none_failed(GatherRanks(folder, 2, policy).run(work)):
        assert torch.equal(logits, wanted)
        assert 2 * statistics.expert_bytes_touched == nbytes  # all are chosen


def test_experts_that_cannot_be_divided_are_refused(tmp_path: Path) -> None:
    torch.set_num_threads(1)
    few, odd = tmp_path / "few", tmp_path / "odd"
    saved("mixtral", few, 2)
    checkpoint(odd, "odd")  # whose matrices would have other addresses
    for folder, num_ranks, words in (
        (few, 5, "has 4 experts a layer, and 5 ranks are to divide them: take 4 ranks"),
        (odd, 2, r"cannot divide the experts of model.layers.0.mlp.experts \(Qwen3Moe"),
    ):
        policy = tensor_policy(tmp_path)
        for error in GatherRanks(folder, num_ranks, policy).run(lambda *_: None):
            with pytest.raises(UsageError, match=words):
                raise error


def test_a_call_that_ranks_cannot_divide_is_refused(tmp_path: Path) -> None:
    """The module's own forward would compute a part of it only."""
    torch.set_num_threads(1)
    saved("mixtral", tmp_path, 2)

    def work(rank: int, model: Any) -> Any:
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            return model(**zoo.inputs("mixtral"))

    for error in GatherRanks(tmp_path, 2, tensor_policy(tmp_path)).run(work):
        with pytest.raises(UsageError, match="cannot divide this call of"):
            raise error


def test_parts_that_do_not_come_out_alike_are_refused(tmp_path: Path) -> None:
    """On all ranks, before any computes."""
    torch.set_num_threads(1)
    saved("mixtral", tmp_path, 4)
    policy = tensor_policy(tmp_path, "120KiB")
    for error in GatherRanks(tmp_path, 2, policy).run(lambda *_: None):
        with pytest.raises(
            UsageError, match="set device_memory to a few per cent more"
        ):
            raise error


def test_experts_that_are_whole_on_all_ranks_are_announced(tmp_path: Path) -> None:
    """Those of DBRX are no stack."""
    torch.set_num_threads(1)
    whole = saved("dbrx", tmp_path, 2)
    given = zoo.inputs("dbrx")

    def work(rank: int, model: Any) -> Any:
        with torch.no_grad():
            return model(**given)[0], penstock.statistics(model).fallbacks

    for found, said in none_failed(
        GatherRanks(tmp_path, 2, tensor_policy(tmp_path)).run(work)
    ):
        with torch.no_grad():
            assert torch.equal(found, whole(**given)[0])
        assert any("each of them streams and computes" in one for one in said)


def test_each_expert_is_computed_by_a_rank_that_holds_it() -> None:
    for num in range(1, 40):
        for num_ranks in range(1, num + 1):
            bounds, held = expert_bounds(num, num_ranks), held_by_each(num, num_ranks)
            computed = [one for low, high in bounds for one in range(low, high)]
            assert computed == list(range(num))
            assert held * num_ranks >= num > (held - 1) * num_ranks
            for rank, (low, high) in enumerate(bounds):
                first = first_held(num, num_ranks, rank)
                assert 0 <= first <= low < high <= first + held <= num
                assert num % num_ranks or (low, high) == (first, first + held)

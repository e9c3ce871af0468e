"""Adapters of models that ranks share."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from deep_zoo import saved
from rank_threads import Ranks, none_failed, policy_of

import penstock
import zoo
from penstock.io.errors import UsageError

peft = pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")


def adapter(resident: Any, folder: Path, *targets: str) -> Path:
    torch.manual_seed(0)
    config = peft.LoraConfig(r=4, target_modules=targets, init_lora_weights=False)
    wrapped = peft.get_peft_model(resident, config)
    wrapped.save_pretrained(folder, save_embedding_layers=False)
    return folder


@pytest.mark.parametrize("num_ranks", [2, pytest.param(3, marks=pytest.mark.whole)])
def test_each_rank_applies_it_to_its_blocks(num_ranks: int, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    resident = saved("llama", folder, 5)
    lora = adapter(resident, tmp_path / "lora", "q_proj", "up_proj")
    io = {"reader": "threads", "cache": tmp_path / "cache"}
    policy = policy_of("600KiB", io=io, adapter=lora)
    given = [zoo.inputs("llama", seed=seed) for seed in range(3)]
    with torch.inference_mode():
        wanted = [resident(**one).logits for one in given]  # PEFT has changed it
    plain = zoo.load("llama_of_5", folder)(**given[0]).logits
    assert not torch.equal(wanted[0], plain)

    def work(rank: int, model: Any) -> list[Any]:
        with penstock.sweep(model, seed=1) as sweep:
            return sweep.map(lambda one: model(**one).logits, given)

    with Ranks(folder, num_ranks, policy) as ranks:
        for found in none_failed(ranks.run(work)):
            assert all(map(torch.equal, found, wanted))


def test_one_that_changes_the_head_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    resident = saved("llama", folder, 5)
    lora = adapter(resident, tmp_path / "lora", "q_proj", "lm_head")
    io = {"reader": "threads", "cache": tmp_path / "cache"}
    with pytest.raises(UsageError, match=r"outside of its blocks \(lm_head\."):
        Ranks(folder, 2, policy_of("600KiB", io=io, adapter=lora))

"""Experts that each compute all tokens (Llama 4) are loaded one by one, too."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from moe_models import GREEDY, batches, checkpoint, expert_bytes, layer_bytes, resident

import penstock
import zoo
from penstock import Policy
from penstock.io.errors import DoesNotFitError
from penstock.offload.model import engine_of
from shares import shared

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("no_leaks")]

F32, BF16 = torch.float32, torch.bfloat16
LINK = {"host": {"bandwidth": "4GiB"}}
TIERS: dict[str, dict[str, Any]] = {
    "disk": {},
    "host": {"host_memory": "16MiB", "links": LINK},
    "in place": {"host_memory": "400KiB"},
    "mixed": {"host_memory": "400KiB", "links": LINK},
}
CASES = [(dtype, tier) for dtype in (F32, BF16) for tier in TIERS]


def streamed(folder: Path, num_bytes: int, **values: Any) -> Any:
    sizes = {"resident_below": 1, "gather_rows": 1000}
    return penstock.load(folder, Policy(device_memory=num_bytes, **sizes, **values))


@pytest.mark.parametrize(
    ("dtype", "tier"), shared(CASES, lambda place, _: place in (0, 3, 6))
)
def test_ranges_give_the_bits_of_the_whole(
    tmp_path: Path, dtype: torch.dtype, tier: str
) -> None:
    """Of one expert and of several; for few and many tokens; plain and in a sweep."""
    whole, folder = resident("llama4", dtype), checkpoint(tmp_path, "llama4", dtype)
    expert = expert_bytes(whole)
    for num_bytes in (layer_bytes(whole), 6 * expert + (64 << 10)):
        with streamed(folder, num_bytes, **TIERS[tier]) as model:
            assert engine_of(model).model_division.stacks
            inputs = [*batches(2), *batches(1, 1, 5), *batches(1, 3, 7)]
            with torch.inference_mode():
                expected = [whole(**batch).logits for batch in inputs]
                for batch, logits in zip(inputs, expected, strict=True):
                    assert torch.equal(model(**batch).logits, logits)
            with penstock.sweep(model, coalesce=False) as sweep:
                made = sweep.map(lambda b: model(**b).logits, inputs)
            assert all(map(torch.equal, made, expected))
            with penstock.sweep(model, coalesce=False) as sweep:
                ids = sweep.map(lambda b: model.generate(**b, **GREEDY), inputs)
            assert all(
                torch.equal(one, whole.generate(**batch, **GREEDY))
                for one, batch in zip(ids, inputs, strict=True)
            )
            assert not penstock.statistics(model).faults


def test_attention_and_two_experts_are_enough(tmp_path: Path) -> None:
    whole, folder = resident("llama4", F32), checkpoint(tmp_path, "llama4")
    layer = whole.model.layers[-1]
    attention = sum(p.nbytes for p in layer.self_attn.parameters())
    shared_expert = layer.feed_forward.shared_expert
    beside = sum(p.nbytes for p in shared_expert.parameters())
    with pytest.raises(DoesNotFitError) as refused:
        streamed(folder, 4096)
    least = int(str(refused.value).split()[-1])
    assert least <= attention + beside + 2 * expert_bytes(whole) < layer_bytes(whole)
    (batch,) = batches(1)
    with streamed(folder, least) as model, torch.inference_mode():
        assert torch.equal(model(**batch).logits, whole(**batch).logits)


def test_each_expert_is_loaded_once_for_all_micro_batches(tmp_path: Path) -> None:
    whole, folder = resident("llama4", F32), checkpoint(tmp_path, "llama4")
    with streamed(folder, layer_bytes(whole) // 2) as model:
        with penstock.sweep(model, coalesce=False) as sweep:
            sweep.map(lambda b: model(**b).logits, batches(4))
        found = penstock.statistics(model)
        assert not engine_of(model)._entry.open_sites.routing.asked_windows
    assert found.expert_bytes_touched == 3 * 16 * expert_bytes(whole)
    assert found.expert_bytes_loaded <= 1.1 * found.expert_bytes_touched


def test_experts_that_stay_together_are_announced(tmp_path: Path) -> None:
    zoo.save_checkpoint("dbrx", tmp_path)
    (sentence,) = whole_experts(tmp_path, 100 << 10)
    assert "transformer.blocks.0.ffn.experts and of 2 other layers" in sentence
    assert "72.0 KiB a layer" in sentence
    assert "DbrxExperts" in sentence
    assert not whole_experts(tmp_path, 1 << 20), "all fit"
    folder = checkpoint(tmp_path / "llama4", "llama4")
    assert not whole_experts(folder, 400 << 10)


def whole_experts(folder: Path, num_bytes: int) -> list[str]:
    with streamed(folder, num_bytes) as model:
        fallbacks = penstock.statistics(model).fallbacks
    return [sentence for sentence in fallbacks if "loaded together" in sentence]

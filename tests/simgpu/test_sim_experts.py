"""Experts that are loaded one by one give the CPU's bits on the simulated GPU, from all
tiers and codecs, whatever the schedule."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from moe_models import GREEDY, batches, checkpoint, layer_bytes, resident

import penstock
from on_device import GPU, TIERS
from penstock import Policy
from penstock.offload.model import engine_of
from quantised import dequantised, fp8_of, fp8_section, original, quantised
from shares import shared
from sim_device import SimGpu, on_device

pytestmark = [pytest.mark.simgpu, pytest.mark.slow]
WAYS = ("grouped_mm", "eager")
CASES = [
    (name, tier, way)
    for name in ("qwen3_moe", "deepseek_v3")
    for tier in ("disk", "host", "peer")
    for way in WAYS
]


def policy(num_bytes: int, **values: Any) -> Policy:
    sizes = {"resident_below": 1, "gather_rows": 1000}
    return Policy(device=GPU, device_memory=num_bytes, **sizes, **values)


@pytest.mark.parametrize(
    ("name", "tier", "way"), shared(CASES, lambda place, _: place == 12)
)
def test_experts_give_the_cpus_bits(
    simgpu: SimGpu, tmp_path: Path, name: str, tier: str, way: str
) -> None:
    whole = resident(name, torch.bfloat16)
    whole.set_experts_implementation(way)
    folder = checkpoint(tmp_path, name, torch.bfloat16)
    with torch.inference_mode():
        wanted = [whole(**batch).logits for batch in batches(3)]
    tokens = [whole.generate(**batch, **GREEDY) for batch in batches(3)]
    tiers = {**TIERS[tier]}
    with penstock.load(folder, policy(layer_bytes(whole), **tiers)) as model:
        assert engine_of(model).model_division.stacks
        model.set_experts_implementation(way)
        inputs = [on_device(batch, GPU) for batch in batches(3)]
        for seed in range(3):
            simgpu.schedule(seed)
            with torch.inference_mode(), penstock.sweep(model, coalesce=False) as s:
                for one, other in zip(
                    s.map(lambda b: model(**b).logits, inputs), wanted, strict=True
                ):
                    assert torch.equal(one.cpu(), other)
        with penstock.sweep(model) as sweep:
            made = sweep.map(lambda b: model.generate(**b, **GREEDY), inputs)
        assert [m.tolist() for m in made] == [t.tolist() for t in tokens]
        assert not penstock.statistics(model).faults


IDS = torch.arange(14).view(2, 7) + 3


@pytest.mark.parametrize("tier", ["disk", "host"])
def test_experts_in_fp8_give_the_cpus_bits(
    simgpu: SimGpu, tmp_path: Path, tier: str
) -> None:
    pytest.importorskip("accelerate", reason="transformers dequantises FP8 with it")

    def blocks_of(name: str, weight: torch.Tensor) -> dict[str, torch.Tensor]:
        numbers, scales = fp8_of(weight, (32, 16))
        return {name: numbers, name + "_scale_inv": scales}

    source = original(tmp_path / "original", "deepseek_v3")
    folder = quantised(source, tmp_path / "fp8", blocks_of, fp8_section((32, 16)))
    with torch.inference_mode():
        wanted = dequantised(folder)(IDS).logits
    with penstock.load(folder, policy(160 << 10, **TIERS[tier])) as model:
        assert engine_of(model).model_division.stacks
        for seed in range(3):
            simgpu.schedule(seed)
            with torch.inference_mode():
                assert torch.equal(model(IDS.to(GPU)).logits.cpu(), wanted)

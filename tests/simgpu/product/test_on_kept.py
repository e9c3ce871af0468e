"""Weights cross links as they are stored, and are decoded on the device."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import pytest
import torch
from test_on_policies import requested

import penstock
from checkpoint import make_checkpoint
from checkpoints import same_bits
from on_device import GPU, TIERS
from penstock import Policy
from quantised import fp8_of, fp8_section, original, quantised
from sim_device import SimGpu

pytestmark = pytest.mark.simgpu

IDS = torch.arange(14).view(2, 7) + 3


def checkpoints(folder: Path) -> dict[str, tuple[Path, str]]:
    """A folder and a dtype of computing, by what is stored."""

    def blocks_of(name: str, weight: torch.Tensor) -> dict[str, torch.Tensor]:
        numbers, scales = fp8_of(weight, (32, 16))
        return {name: numbers, f"{name}_scale_inv": scales}

    whole = original(folder / "whole", "qwen3_moe")
    (folder / "fp8").mkdir()
    fp8 = quantised(whole, folder / "fp8", blocks_of, fp8_section((32, 16)))
    bf16 = make_checkpoint(folder / "bf16", "tiny", dtype="bfloat16")
    return {"fp8": (fp8, "auto"), "cast": (bf16, "float32")}


def outputs(folder: Path, device: str, **values: Any) -> tuple[list[torch.Tensor], Any]:
    memory = (1400 if "placement" in values else 160) << 10  # a layer stays there
    if values.get("weights_kept") == "auto":  # each link decodes in a part of it
        links = 1 + ("host_memory" in values) + len(values.get("peer", ()))
        memory += links * (96 << 10)
    policy = Policy(device=device, device_memory=memory, resident_below=1, **values)
    there = IDS.to(device)
    with penstock.load(folder, policy) as model, torch.inference_mode():
        before = requested() if device == GPU else 0
        found = [model(there).logits.cpu() for _ in range(2)]
        found.append(model.generate(there, max_new_tokens=3, do_sample=False).cpu())
        statistics = penstock.statistics(model)
        if device == GPU:  # the scratch of decoding is there by now
            gc.collect()
            assert isinstance(policy.device_memory, int)
            room = policy.device_memory - statistics.device_memory_bytes
            assert requested() - before <= room
        return found, statistics


def test_every_tier_gives_the_cpus_bits(simgpu: SimGpu, tmp_path: Path) -> None:
    pytest.importorskip("accelerate", reason="transformers reads FP8 only with it")
    differences = []
    for kind, (folder, dtype) in checkpoints(tmp_path).items():
        wanted, _ = outputs(folder, "cpu", dtype=dtype)
        for seed, (tier, values) in enumerate(TIERS.items()):
            simgpu.schedule(seed)
            read = {}
            for kept in ("decoded", "auto"):
                found, statistics = outputs(
                    folder, GPU, dtype=dtype, weights_kept=kept, **values
                )
                if not all(map(same_bits, found, wanted)):
                    differences.append((kind, tier, kept))
                read[kept] = statistics.bytes_read
            # Windows of experts as small as these take as much as what is decoded.
            if tier in ("host", "peer") and kind == "cast":
                assert read["auto"][tier] < read["decoded"][tier]
    assert not differences

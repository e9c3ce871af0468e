"""What torch can be asked for around a forward: autocast, and compiled blocks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from test_on_tasks import PROMPTS, SMALL

import penstock
from checkpoint import make_checkpoint
from nets import Net, batches, make, same, serially
from on_device import GPU, TIERS
from penstock import Policy
from sim_device import SimGpu

pytestmark = [pytest.mark.simgpu, pytest.mark.usefixtures("few_objects")]


def mixed(module: Any, items: list[torch.Tensor]) -> list[torch.Tensor]:
    """Every other batch in bfloat16 where torch has matrix products."""
    return [forward(module, number, item) for number, item in enumerate(items)]


def forward(module: Any, number: int, item: torch.Tensor) -> torch.Tensor:
    kind, is_on = item.device.type, number % 2 == 0
    with torch.autocast(kind, dtype=torch.bfloat16, enabled=is_on):
        found = module(item)
    assert isinstance(found, torch.Tensor)
    return found


def test_autocast_is_each_micro_batchs_own(simgpu: SimGpu) -> None:
    """From each tier; with activations on the device, and moved out."""
    net, items = make(Net), batches(4, rows=300)
    expected = mixed(net, items)
    assert [x.dtype for x in expected] == 2 * [torch.bfloat16, torch.float32]
    there = [item.to(GPU) for item in items]
    different = []
    for tier, values in TIERS.items():
        for activations in ("device", "host"):
            policy = Policy(
                device=GPU,
                device_memory="40KiB",
                resident_below=1,
                activations=activations,
                **values,
            )
            with penstock.wrap(net, policy), torch.inference_mode():
                for seed in range(4):
                    simgpu.schedule(seed)
                    found = mixed(net, there)
                    with penstock.sweep(net) as sweep:
                        found += sweep.map(
                            lambda pair: forward(net, *pair), enumerate(there)
                        )
                    if not same([x.cpu() for x in found], expected * 2):
                        different.append((tier, activations, seed))
    assert not different


def test_blocks_that_nothing_compiles_for_run_eagerly_and_it_is_said(
    simgpu: SimGpu, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """torch's compiler knows no code generator for this device."""
    folder = make_checkpoint(
        tmp_path / "tiny", "tiny", dtype="float32", shards_of="100KB"
    )
    with penstock.load(folder, Policy(**SMALL)) as model:
        expected = list(penstock.generate(model, PROMPTS, max_new_tokens=3))
    simgpu.schedule(1)
    policy = Policy(device=GPU, compile=True, **SMALL)
    with penstock.load(folder, policy) as model:
        assert list(penstock.generate(model, PROMPTS, max_new_tokens=3)) == expected
        fallbacks = penstock.statistics(model).fallbacks
    said = [text for text in fallbacks if "is not compiled and runs eagerly" in text]
    assert said
    assert all(text in caplog.text for text in said)


def test_weights_arrive_where_the_model_was_loaded_in_inference_mode(
    simgpu: SimGpu,
) -> None:
    """The threads that copy them are not in that mode."""
    for tier, values in TIERS.items():
        net, items = make(Net), batches(2)
        expected = serially(net, items)
        with torch.inference_mode():
            policy = Policy(
                device=GPU, device_memory="40KiB", resident_below=1, **values
            )
            with penstock.wrap(net, policy), penstock.sweep(net) as sweep:
                swept = sweep.map(net, [item.to(GPU) for item in items])
            assert same([x.cpu() for x in swept], expected), tier

"""Models on the simulated GPU give the CPU's bits, whatever the schedule."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import zoo
from sim_device import SimGpu, first_output, on_device

pytestmark = [pytest.mark.simgpu, pytest.mark.slow]
GPU = "simgpu:0"
DTYPES = [torch.float32, torch.bfloat16]
ARCHITECTURES = [
    "qwen3_moe",
    "gemma2",
    "falcon",
    "mamba",
    "zamba2",
    "deberta_v2",
    "t5",
    "whisper",
    "vit",
    "llava",
]


def outputs(model: Any, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    with torch.inference_mode():
        return first_output(model(**inputs)).cpu()


@pytest.mark.parametrize("dtype", DTYPES)
def test_llama_gives_the_cpus_bits(simgpu: SimGpu, dtype: torch.dtype) -> None:
    model, inputs = zoo.build("llama").to(dtype), zoo.inputs("llama")
    expected = outputs(model, inputs)
    model.to(GPU)
    for seed in range(3):
        simgpu.schedule(seed)
        assert torch.equal(outputs(model, on_device(inputs, GPU)), expected)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_an_architecture_gives_the_cpus_bits(simgpu: SimGpu, name: str) -> None:
    simgpu.schedule(1)
    model, inputs = zoo.build(name), zoo.inputs(name)
    expected = outputs(model, inputs)
    assert torch.equal(outputs(model.to(GPU), on_device(inputs, GPU)), expected)


@pytest.mark.parametrize("do_sample", [False, True])
def test_llama_generates_what_the_cpu_does(simgpu: SimGpu, do_sample: bool) -> None:
    model, inputs = zoo.build("llama"), zoo.inputs("llama")
    options = {"max_new_tokens": 6, "do_sample": do_sample, "pad_token_id": 0}
    torch.manual_seed(5)
    expected = model.generate(**inputs, **options)
    simgpu.schedule(2)
    torch.manual_seed(5)
    generated = model.to(GPU).generate(**on_device(inputs, GPU), **options)
    assert generated.tolist() == expected.tolist()


def test_gradients_are_the_cpus(simgpu: SimGpu) -> None:
    model, inputs = zoo.build("llama"), zoo.inputs("llama")
    found = []
    for device in ("cpu", GPU):
        model.to(device).zero_grad()
        loss = first_output(model(**on_device(inputs, device))).square().mean()
        loss.backward()  # type: ignore[no-untyped-call]
        found.append(model.lm_head.weight.grad.cpu())
    torch.testing.assert_close(*found)

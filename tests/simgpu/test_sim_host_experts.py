"""Experts that the CPU computes where they lie, beside the simulated GPU, give the bits
of the resident model, and are not loaded."""

from __future__ import annotations

import copy
import gc
import threading
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from moe_models import GREEDY, batches, checkpoint, expert_bytes, layer_bytes, resident

import penstock
from on_device import GPU
from penstock import Policy
from penstock.offload.model import engine_of
from quantised import dequantised, fp8_of, fp8_section, original, quantised
from shares import shared
from sim_device import SimGpu, on_device

pytestmark = [pytest.mark.simgpu, pytest.mark.slow]
ALWAYS = 1 << 20
"""More tokens than any expert gets."""
F32, BF16 = torch.float32, torch.bfloat16
CASES = [
    (name, dtype, way, experts)
    for name in ("qwen3_moe", "deepseek_v3")
    for dtype in (F32, BF16)
    for way in ("grouped_mm", "batched_mm", "eager")
    for experts in (2, 4, ALWAYS)
]


def policy(num_bytes: int, **values: Any) -> Policy:
    sizes = {"resident_below": 1, "gather_rows": 1000, "host_memory": "1GiB"}
    return Policy(device=GPU, device_memory=num_bytes, **{**sizes, **values})


@pytest.mark.parametrize(
    ("name", "dtype", "way", "experts"),
    shared(CASES, lambda place, _: place % 22 == 2),
)
def test_experts_on_the_cpu_give_the_bits_of_the_resident_model(
    simgpu: SimGpu,
    tmp_path: Path,
    name: str,
    dtype: torch.dtype,
    way: str,
    experts: int,
) -> None:
    whole = resident(name, dtype)
    whole.set_experts_implementation(way)
    folder = checkpoint(tmp_path, name, dtype)
    with torch.inference_mode():
        wanted = [whole(**batch).logits for batch in batches(3)]
    tokens = [whole.generate(**batch, **GREEDY) for batch in batches(3)]
    tight = policy(layer_bytes(whole), experts=experts)
    with penstock.load(folder, tight) as model:
        model.set_experts_implementation(way)
        inputs = [on_device(batch, GPU) for batch in batches(3)]
        for seed in range(3):
            simgpu.schedule(seed)
            with torch.inference_mode(), penstock.sweep(model, coalesce=False) as s:
                made = s.map(lambda b: model(**b).logits, inputs)
            for one, other in zip(made, wanted, strict=True):
                assert torch.equal(one.cpu(), other)
        with penstock.sweep(model) as sweep:
            made = sweep.map(lambda b: model.generate(**b, **GREEDY), inputs)
        assert [m.tolist() for m in made] == [t.tolist() for t in tokens]
        found = penstock.statistics(model)
        assert not found.faults
        assert found.host_expert_tokens


IDS = torch.arange(14).view(2, 7) + 3


def test_experts_in_fp8_are_decoded_where_they_lie(
    simgpu: SimGpu, tmp_path: Path
) -> None:
    pytest.importorskip("accelerate", reason="transformers dequantises FP8 with it")

    def blocks_of(name: str, weight: torch.Tensor) -> dict[str, torch.Tensor]:
        numbers, scales = fp8_of(weight, (32, 16))
        return {name: numbers, name + "_scale_inv": scales}

    source = original(tmp_path / "original", "deepseek_v3")
    folder = quantised(source, tmp_path / "fp8", blocks_of, fp8_section((32, 16)))
    with torch.inference_mode():
        wanted = dequantised(folder)(IDS).logits
    stored = policy(400 << 10, experts=ALWAYS, weights_kept="stored")
    with penstock.load(folder, stored) as model:
        assert engine_of(model).arrangement.images is not None
        for seed in range(2):
            simgpu.schedule(seed)
            with torch.inference_mode():
                assert torch.equal(model(IDS.to(GPU)).logits.cpu(), wanted)
        assert penstock.statistics(model).host_expert_tokens


def counted(model: Any, batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, Any]:
    """The logits of a batch, and what the experts of its forward come to."""
    before = penstock.statistics(model)
    with torch.inference_mode():
        logits = model(**on_device(batch, GPU)).logits.cpu()
    after = penstock.statistics(model)
    names = ("bytes", "calls", "tokens")
    return logits, {
        name: getattr(after, f"host_expert_{name}")
        - getattr(before, f"host_expert_{name}")
        for name in names
    }


def test_what_the_cpu_computes_is_counted_and_not_loaded(
    simgpu: SimGpu, tmp_path: Path
) -> None:
    """A wrapped model, whose weights are also updated, and then unwrapped."""
    whole = copy.deepcopy(resident("qwen3_moe", F32))
    (batch,) = batches(1)
    chosen: list[torch.Tensor] = []
    hooks = [
        module.register_forward_pre_hook(lambda _, args: chosen.append(args[1]))
        for name, module in whole.named_modules()
        if name.endswith("experts")
    ]
    with torch.inference_mode():
        wanted = whole(**batch).logits
    for hook in hooks:
        hook.remove()
    calls = sum(len(set(each.flatten().tolist())) for each in chosen)
    own = type(whole.model.layers[1].mlp.experts)
    values = policy(layer_bytes(whole), experts=ALWAYS, io={"cache": tmp_path})
    model = penstock.wrap(copy.deepcopy(whole), values)
    logits, found = counted(model, batch)
    assert torch.equal(logits, wanted)
    assert found == {
        "bytes": calls * expert_bytes(whole),
        "calls": calls,
        "tokens": sum(each.numel() for each in chosen),
    }
    assert penstock.statistics(model).expert_bytes_touched == 0
    name = "model.layers.1.mlp.experts.down_proj"
    new = whole.get_parameter(name).detach().flip(0).clone()
    penstock.update(model, {name: new})
    with torch.inference_mode():
        whole.get_parameter(name).copy_(new)
        assert torch.equal(counted(model, batch)[0], whole(**batch).logits)
    unwrapped = penstock.unwrap(model)
    assert type(unwrapped.model.layers[1].mlp.experts) is own
    assert not list(tmp_path.glob("*/*.safetensors"))


def test_the_computing_thread_waits_for_hidden_states_only(
    simgpu: SimGpu, tmp_path: Path
) -> None:
    """Once in each window, at most."""
    whole, folder = resident("qwen3_moe", F32), checkpoint(tmp_path, "qwen3_moe")
    waits = {}
    for experts in ("device", ALWAYS):
        values = policy(layer_bytes(whole), experts=experts)
        with penstock.load(folder, values) as model, torch.inference_mode():
            batch = on_device(batches(1)[0], GPU)
            with simgpu.held(torch.accelerator.current_stream()):
                before = simgpu.syncs(this_thread=True)
                model(**batch)
                waits[experts] = simgpu.syncs(this_thread=True) - before
            windows = sum(
                len(s.windows) for s in engine_of(model).model_division.stacks
            )
    more = waits[ALWAYS] - waits["device"]
    assert set(more) <= {"event", "covered"}
    assert 1 <= more.total() <= windows


def test_experts_that_are_used_most_get_slots(simgpu: SimGpu, tmp_path: Path) -> None:
    """As long as they have none, the CPU computes them."""
    whole, folder = resident("qwen3_moe", F32), checkpoint(tmp_path, "qwen3_moe")
    (batch,) = batches(1, 1, 2)
    with torch.inference_mode():
        wanted = whole(**batch).logits
    num_bytes = 2 * layer_bytes(whole)
    with penstock.load(folder, policy(num_bytes, experts=ALWAYS)) as model:
        simgpu.schedule(1, held_seconds=0.01)
        calls = []
        for _ in range(10):
            logits, found = counted(model, batch)
            assert torch.equal(logits, wanted)
            calls.append(found["calls"])
    assert calls == sorted(calls, reverse=True)
    assert calls[0] > 8
    assert calls[-1] == 0


@pytest.mark.parametrize("experts", ["device", 3])
def test_experts_that_come_to_host_memory_give_the_same_bits(
    simgpu: SimGpu, tmp_path: Path, experts: str | int
) -> None:
    """A place is written to once its copies are done, and read from once it is read;
    whatever step that is at, the model may be closed."""
    whole, folder = resident("qwen3_moe", F32), checkpoint(tmp_path, "qwen3_moe")
    few = policy(432 << 10, experts=experts, lookahead=0, host_memory="800KiB")
    prompts = batches(2, 1, 2)
    with torch.inference_mode():
        wanted = [whole(**batch).logits for batch in prompts]
    found = 0
    for num in (5, 16):
        with penstock.load(folder, few) as model, torch.inference_mode():
            for seed in range(num):
                simgpu.schedule(seed, held_seconds=0.002, late_seconds=1e-4)
                turn = seed // 8 % 2
                logits = model(**on_device(prompts[turn], GPU)).logits
                assert torch.equal(logits.cpu(), wanted[turn])
            statistics = penstock.statistics(model)
            found = statistics.host_experts_exchanged
            assert bool(statistics.host_expert_calls) == (experts != "device")
    assert found > 1


class Failing(torch.nn.Module):
    """An activation that fails on the CPU, in its call number `at`."""

    def __init__(self, own: torch.nn.Module, at: int) -> None:
        super().__init__()
        self.own, self.at = own, at

    def forward(self, states: torch.Tensor) -> Any:
        self.at -= states.device.type == "cpu"
        if self.at == 0:
            raise RuntimeError("no more")
        return self.own(states)


@pytest.mark.usefixtures("no_leaks")
def test_a_failure_on_the_cpu_leaves_nothing(simgpu: SimGpu, tmp_path: Path) -> None:
    whole, folder = resident("qwen3_moe", F32), checkpoint(tmp_path, "qwen3_moe")
    (batch,) = batches(1)
    with torch.inference_mode():
        wanted = whole(**batch).logits
    with penstock.load(folder, policy(layer_bytes(whole), experts=4)) as model:
        experts = model.model.layers[1].mlp.experts
        own = experts.act_fn
        for at in (1, 3):
            experts.act_fn = Failing(own, at)
            with pytest.raises(RuntimeError, match="no more"):
                counted(model, batch)
            experts.act_fn = own
            assert not engine_of(model)._entry.open_sites.routing.asked_windows
            assert torch.equal(counted(model, batch)[0], wanted)


@pytest.mark.usefixtures("all_objects")
def test_a_dropped_model_leaves_nothing(simgpu: SimGpu, tmp_path: Path) -> None:
    folder = checkpoint(tmp_path, "qwen3_moe")
    few = policy(432 << 10, experts=3, lookahead=0, host_memory="800KiB")
    model = penstock.load(folder, few)
    for _ in range(6):
        counted(model, batches(1, 1, 2)[0])
    dropped = weakref.ref(model)
    del model
    gc.collect()
    assert dropped() is None
    assert not [t for t in threading.enumerate() if t.name.startswith("penstock-")]


def test_no_effect_is_announced(simgpu: SimGpu, tmp_path: Path) -> None:
    whole, folder = resident("qwen3_moe", F32), checkpoint(tmp_path, "qwen3_moe")
    (batch,) = batches(1)
    tight = layer_bytes(whole)
    for values, words in (
        (policy(tight, experts="host"), "without a number of tokens"),
        (policy(64 << 20, experts=8), "loaded as they are chosen"),
        (policy(tight, experts=8, placement={"experts": "disk"}), "in host memory"),
        (policy(tight, experts=8, host_memory=None), "no weights stay in host"),
    ):
        with penstock.load(folder, values) as model:
            _, found = counted(model, batch)
            assert found == {"bytes": 0, "calls": 0, "tokens": 0}
            (said,) = (x for x in penstock.statistics(model).fallbacks if "expert" in x)
            assert words in said


def test_gradients_are_recorded_on_the_device(simgpu: SimGpu, tmp_path: Path) -> None:
    whole, folder = resident("qwen3_moe", F32), checkpoint(tmp_path, "qwen3_moe")
    with penstock.load(folder, policy(layer_bytes(whole), experts=ALWAYS)) as model:
        states = torch.randn(1, 5, 64, device=GPU, requires_grad=True)
        model(inputs_embeds=states)
        assert penstock.statistics(model).host_expert_calls == 0
        model(inputs_embeds=states.detach())
        assert penstock.statistics(model).host_expert_calls

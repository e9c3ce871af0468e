"""Whatever a policy asks for on the simulated GPU, in whatever order its streams run:
outputs are the CPU's, and no byte more is taken than was asked for."""

from __future__ import annotations

import gc
from random import Random
from typing import Any

import pytest
import torch
from test_any_policy import Uneven, random_policy, wrapped

import penstock
from nets import Net, batches, make, same, serially
from on_device import GPU
from penstock import Policy
from shares import shared
from sim_device import SimGpu

pytestmark = [pytest.mark.simgpu, pytest.mark.usefixtures("few_objects")]

NUM_POLICIES = 300
NUM_SCHEDULES = 1000
PER_PROCESS = 10
_ROOM_BYTES = 256 << 10
"""Activations, results, and what the allocator rounds up."""


def policy_for(seed: int) -> dict[str, Any]:
    """A random policy of the CPU's, for the simulated GPU and the one beside it."""
    random = Random(seed)
    values = random_policy(random)
    values["device"] = GPU
    if random.random() < 0.3:
        values["activations"] = "host"
    if "peer" in values:
        values["peer"] = {"simgpu:1": values["peer"]["cpu"]}
    values["placement"] = {
        rule: "peer" if tier == "cpu" else tier
        for rule, tier in values["placement"].items()
    }
    return values


def run(values: dict[str, Any], module: Any) -> list[torch.Tensor]:
    """What plain calls and a sweep give of four batches."""
    there = [item.to(GPU) for item in batches(4)]
    policy = wrapped(module, values)
    try:
        plain = serially(module, there)
        with penstock.sweep(module, width=3) as sweep:
            swept = sweep.map(module, there)
        found = [result.cpu() for result in plain + swept]
        statistics = penstock.statistics(module)
    finally:
        penstock.unwrap(module)
    assert isinstance(policy.device_memory, int)
    assert statistics.device_memory_bytes <= policy.device_memory
    assert sum(statistics.bytes_by_tier.values()) == statistics.model_bytes
    assert statistics.faults == {}
    return found


def check(simgpu: SimGpu, seed: int) -> None:
    values = policy_for(seed)
    module, items = make(Uneven), batches(4)
    expected = serially(module, items)
    before = torch.accelerator.memory_allocated(0)
    simgpu.schedule(seed)
    simgpu.set_capacity(before + values["device_memory"] + _ROOM_BYTES)
    assert same(run(values, module), expected * 2), values
    gc.collect()
    assert torch.accelerator.memory_allocated(0) == before, "memory is left"
    assert same(serially(module, items), expected)


@pytest.mark.parametrize(
    "start", shared(range(0, NUM_POLICIES, PER_PROCESS), lambda place, _: place == 0)
)
def test_whatever_is_asked_for_outputs_are_equal_in_the_memory_given(
    simgpu: SimGpu, start: int
) -> None:
    for seed in range(start, start + PER_PROCESS):
        check(simgpu, seed)


@pytest.mark.parametrize(
    "start", shared(range(0, NUM_SCHEDULES, 100), lambda place, _: place == 0)
)
def test_in_whatever_order_streams_run_outputs_are_equal(
    simgpu: SimGpu, start: int, request: pytest.FixtureRequest
) -> None:
    """Streams run ahead of each other, by schedules of their own for each pass."""
    net, items = make(Net), batches(4)
    expected = serially(net, items)
    there = [item.to(GPU) for item in items]
    policy = Policy(
        device=GPU,
        device_memory="20KiB",
        resident_below=1,
        host_memory="8KiB",
        peer={"simgpu:1": "8KiB"},
        staging_memory=1,
    )
    num = 100 if request.config.getoption("--whole") else 10
    with penstock.wrap(net, policy):
        for seed in range(start, start + num):
            simgpu.schedule(seed)
            with penstock.sweep(net) as sweep:
                found = [result.cpu() for result in sweep.map(net, there)]
            assert same(found, expected), f"schedule {seed}"

"""Whatever a policy asks for on the simulated GPU, in whatever order its streams run:
outputs are the CPU's, and no byte more is taken than was asked for."""

from __future__ import annotations

from dataclasses import dataclass
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
from sim_device import CAPACITY_BYTES, SimGpu

pytestmark = [pytest.mark.simgpu, pytest.mark.usefixtures("few_objects")]

NUM_POLICIES = 300
NUM_SCHEDULES = 1000
PER_PROCESS = 10
_SEGMENT_BYTES = 64 << 10
"""The device's memory is reserved in multiples of it (see memory.cpp): one more than
the working set has holds the tests' results, and activations."""
_WIDTH = 3


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


@dataclass(frozen=True)
class Resident:
    """A module on the device as a whole: what it gives, and the most bytes that one
    forward of it takes beside weights and inputs."""

    results: list[torch.Tensor]
    activation_bytes: int
    result_bytes: int

    @classmethod
    def of(cls, module: Any, items: list[torch.Tensor]) -> Resident:
        results = serially(module, items)
        there = items[0].to(GPU)
        module.to(GPU)
        before = requested()
        torch.accelerator.reset_peak_memory_stats()
        serially(module, [there])
        peak = requested("peak")
        module.to("cpu")
        return cls(results, peak - before, results[0].nbytes)


def requested(when: str = "current", device: int = 0) -> int:
    """Bytes that somebody asked the device for and has not freed, to the byte: not
    rounded up as the allocator does."""
    found = torch.accelerator.memory_stats(device)
    return int(found[f"requested_bytes.all.{when}"])


def run(
    values: dict[str, Any], module: Any, there: list[torch.Tensor], resident: Resident
) -> list[torch.Tensor]:
    """What plain calls and a sweep give of the batches `there`. The library takes what
    its statistics say and no byte more, which is no more than the policy says; results
    and activations are the user's."""
    before = [requested(device=device) for device in range(2)]
    policy = wrapped(module, values)
    try:
        statistics = penstock.statistics(module)
        assert isinstance(policy.device_memory, int)
        assert statistics.device_memory_bytes <= policy.device_memory
        assert requested() - before[0] == statistics.device_memory_bytes
        on_peer = requested(device=1) - before[1]
        assert statistics.bytes_by_tier.get("peer", 0) <= on_peer
        assert on_peer <= policy.peer.get("simgpu:1", 0)
        library = requested()
        torch.accelerator.reset_peak_memory_stats()
        plain = serially(module, there)
        others = (len(plain) - 1) * resident.result_bytes
        assert requested("peak") <= library + others + resident.activation_bytes
        with penstock.sweep(module, width=_WIDTH) as sweep:
            swept = sweep.map(module, there)
        others += len(swept) * resident.result_bytes
        waiting = _WIDTH * resident.activation_bytes
        assert requested("peak") <= library + others + waiting
        assert requested() - library == others + resident.result_bytes
        found = [result.cpu() for result in plain + swept]
        statistics = penstock.statistics(module)
    finally:
        penstock.unwrap(module)
    assert sum(statistics.bytes_by_tier.values()) == statistics.model_bytes
    assert statistics.faults == {}
    return found


def check(simgpu: SimGpu, seed: int) -> None:
    values = policy_for(seed)
    module, items = make(Uneven), batches(4)
    resident = Resident.of(module, items)
    there = [item.to(GPU) for item in items]
    torch.accelerator.empty_cache()
    before = torch.accelerator.memory_reserved(0), requested()
    simgpu.schedule(seed)
    segments = -(-values["device_memory"] // _SEGMENT_BYTES) + 1
    simgpu.set_capacity(before[0] + segments * _SEGMENT_BYTES)
    try:
        found = run(values, module, there, resident)
    finally:
        simgpu.set_capacity(CAPACITY_BYTES)
    assert same(found, resident.results * 2), values
    assert requested() == before[1], "memory is left"
    assert same(serially(module, items), resident.results)


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

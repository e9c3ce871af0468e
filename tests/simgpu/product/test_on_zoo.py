"""Every architecture, streamed on the simulated GPU from every tier, gives the bits of
the CPU's resident model."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

import penstock
import zoo
from on_device import GPU, TIERS, load_tight
from penstock.io.errors import DoesNotFitError
from shares import shared
from sim_device import SimGpu, first_output, on_device

pytestmark = pytest.mark.simgpu

NAMES = [name for name, case in zoo.ARCHITECTURES.items() if not case.mutates]
GREEDY = {"max_new_tokens": 3, "do_sample": False}
PER_PROCESS = 3
KEPT = ("llama", "marian", "t5", "mixtral", "gemma3n_text")
"""A sample: dense, positions that no file holds, an encoder, experts, shared states."""

Outputs = dict[str, list[torch.Tensor]]


def outputs(
    model: Any, batches: list[dict[str, torch.Tensor]], generates: bool
) -> Outputs:
    with torch.inference_mode():
        found = {"forward": [first_output(model(**batch)) for batch in batches]}
    if generates:
        found["generate"] = [model.generate(**batch, **GREEDY) for batch in batches]
    return {way: [tensor.cpu() for tensor in found[way]] for way in found}


def swept(
    model: Any, batches: list[dict[str, torch.Tensor]], generates: bool
) -> Outputs:
    def run(way: Callable[..., torch.Tensor]) -> list[torch.Tensor]:
        with penstock.sweep(model) as sweep:
            return [x.cpu() for x in sweep.map(lambda batch: way(**batch), batches)]

    found = {"forward": run(lambda **batch: first_output(model(**batch)))}
    if generates:
        found["generate"] = run(lambda **batch: model.generate(**batch, **GREEDY))
    return found


def streamed(
    name: str, folder: Path, values: Mapping[str, Any], least: int = 1
) -> list[Outputs]:
    """What plain calls and sweeps give."""
    generates = zoo.ARCHITECTURES[name].generates
    batches = [on_device(zoo.inputs(name, seed=seed), GPU) for seed in range(2)]
    try:
        with load_tight(folder, values, least) as model:
            found = [outputs(model, batches, False), swept(model, batches, generates)]
            statistics = penstock.statistics(model)
    except DoesNotFitError:  # weights that were read outside of their forward stay
        assert least < 12, "it cannot be streamed"
        return streamed(name, folder, values, least + 1)
    assert sum(statistics.bytes_read.values()) > statistics.model_bytes
    return found


def differences(simgpu: SimGpu, name: str, folder: Path, tiers: list[str]) -> list[str]:
    zoo.save_checkpoint(name, folder)
    generates = zoo.ARCHITECTURES[name].generates
    batches = [zoo.inputs(name, seed=seed) for seed in range(2)]
    resident = zoo.load(name, folder)
    for parameter in resident.parameters():
        # From addresses in the file: the CPU's products of one row have other last bits
        # where these are no multiples of 16, which those in a device's memory are.
        parameter.data = parameter.data.clone()
    expected = outputs(resident, batches, generates)
    del resident
    found = []
    for seed, tier in enumerate(tiers):
        simgpu.schedule(seed)
        found += [
            f"{name} from {tier}: {way} {number}"
            for number, given in enumerate(streamed(name, folder, TIERS[tier]))
            for way, tensors in given.items()
            if not all(map(torch.equal, tensors, expected[way]))
        ]
    return found


def test_a_sample_of_architectures_gives_the_cpus_bits(
    simgpu: SimGpu, tmp_path: Path
) -> None:
    found = []
    for place, name in enumerate(KEPT):
        tier = list(TIERS)[(place + 1) % len(TIERS)]
        found += differences(simgpu, name, tmp_path / name, [tier])
    assert not found


@pytest.mark.parametrize(
    "start", shared(range(0, len(NAMES), PER_PROCESS), lambda *_: False)
)
def test_every_architecture_gives_the_cpus_bits_from_every_tier(
    simgpu: SimGpu, tmp_path: Path, start: int
) -> None:
    found = []
    for name in NAMES[start : start + PER_PROCESS]:
        found += differences(simgpu, name, tmp_path / name, list(TIERS))
    assert not found

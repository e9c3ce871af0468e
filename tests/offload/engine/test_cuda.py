"""A streamed model on a GPU against the resident one on the same GPU, bit for bit.

A few of them run on the CPU, too, where there is nothing to copy: what is said here
must hold on any device, and these tests must not rot where there is no GPU.
"""

from __future__ import annotations

import gc
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from gpu_device import GPU, NAME

import nets
import penstock
import zoo
from penstock import Policy
from penstock.io.devices.accelerators import allocated_bytes
from penstock.io.errors import DoesNotFitError
from penstock.offload.tasks.head import CausalScorer

DEVICES = ("cpu", pytest.param(NAME, marks=GPU))
# Plain, merged experts, positions in a buffer, tied, ALiBi, sliding windows.
NAMES = ("llama", "mixtral", "gpt2", "opt", "bloom", "gemma2")
TIERS: dict[str, dict[str, Any]] = {
    "disk": {},
    "host": {"host_memory": "1GiB"},
    "half on the device": {
        "placement": {r"\b[02468]$": "device"},
        "device_memory": "64MiB",
        "host_memory": "1GiB",
    },
}
CASES = [
    *(("cpu", "llama", tier) for tier in TIERS),
    *(pytest.param(NAME, name, tier, marks=GPU) for name in NAMES for tier in TIERS),
]
SEEDS = [
    *(("cpu", seed) for seed in range(2)),
    *(pytest.param(NAME, seed, marks=GPU) for seed in range(8)),
]
GREEDY = {"max_new_tokens": 4, "do_sample": False}

pytestmark = [pytest.mark.usefixtures("no_leaks")]

Batch = dict[str, torch.Tensor]


def on(device: str, batch: Batch) -> Batch:
    return {key: value.to(device) for key, value in batch.items()}


def saved(name: str, folder: Path, device: str) -> tuple[Any, list[Batch]]:
    """The resident model on `device`, saved to `folder`, and batches for it."""
    zoo.save_checkpoint(name, folder)
    return (
        zoo.load(name, folder).to(device),
        [on(device, zoo.inputs(name, seed=seed)) for seed in range(3)],
    )


def load(folder: Path, device: str, **settings: Any) -> Any:
    """In the smallest of a few budgets that will do, unless one is given."""
    total = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    for quarters in (1, 2, 3, 4, 6):
        values = {"device_memory": total * quarters // 4, **settings}
        try:
            return penstock.load(
                folder, Policy(device=device, resident_below=256, **values)
            )
        except DoesNotFitError:
            continue
    raise AssertionError(f"{folder} cannot be streamed on {device}")


def logits_of(model: Any, batch: Batch) -> torch.Tensor:
    logits = model(**batch).logits
    assert isinstance(logits, torch.Tensor)
    return logits


def check_equal(resident: Any, model: Any, batches: list[Batch], device: str) -> None:
    with torch.inference_mode():
        expected = [logits_of(resident, batch) for batch in batches]
        plain = [logits_of(model, batch) for batch in batches]
    with penstock.sweep(model) as sweep:
        swept = sweep.map(lambda batch: logits_of(model, batch), batches)
    for one, two, three in zip(expected, plain, swept, strict=True):
        assert one.device == torch.device(device)
        assert torch.equal(one, two), "a plain call differs"
        assert torch.equal(one, three), "a swept call differs"


@pytest.mark.slow
@pytest.mark.parametrize(("device", "name", "tier"), CASES)
def test_streamed_equals_resident_on_the_same_device(
    device: str, name: str, tier: str, tmp_path: Path
) -> None:
    resident, batches = saved(name, tmp_path, device)
    with load(tmp_path, device, **TIERS[tier]) as model:
        check_equal(resident, model, batches, device)
        expected = [resident.generate(**batch, **GREEDY) for batch in batches]
        with penstock.sweep(model) as sweep:
            found = sweep.map(lambda b: model.generate(**b, **GREEDY), batches)
        for one, other in zip(expected, found, strict=True):
            assert torch.equal(one, other), "generate differs"
        statistics = penstock.statistics(model)
        assert not [f for f in statistics.fallbacks if "pinned" in f]
        if device != "cpu" and tier == "host":
            assert statistics.bytes_read["host"] > 0, "nothing came from the host"


@pytest.mark.slow
@pytest.mark.parametrize("device", DEVICES)
def test_scores_equal_those_of_the_resident_model(device: str, tmp_path: Path) -> None:
    resident, batches = saved("llama", tmp_path, device)
    ids = [batch["input_ids"] for batch in batches]
    scorer = CausalScorer(resident, max_logits_bytes=10_000)
    with torch.inference_mode():
        expected = [scorer.log_probabilities(row, None) for row in ids]
    with load(tmp_path, device) as model:
        streamed = CausalScorer(model, max_logits_bytes=10_000)
        with penstock.sweep(model) as sweep:
            found = sweep.map(lambda row: streamed.log_probabilities(row, None), ids)
    for one, other in zip(expected, found, strict=True):
        assert torch.equal(one, other)


@pytest.mark.slow
@pytest.mark.parametrize(("device", "seed"), SEEDS)
def test_any_policy_gives_the_same_bits(device: str, seed: int, tmp_path: Path) -> None:
    random = Random(seed)
    name = random.choice(NAMES)
    resident, batches = saved(name, tmp_path, device)
    total = sum(file.stat().st_size for file in tmp_path.glob("*.safetensors"))
    settings: dict[str, Any] = {
        "lookahead": random.randrange(4),
        "io": {
            "reader": random.choice(["threads", "aiofiles", "auto"]),
            "max_gap": random.choice([1, 512, 32 << 10]),
            "chunk": random.choice([4096, 64 << 10]),
        },
    }
    if random.random() < 0.7:
        settings["host_memory"] = random.randrange(1, 2 * total)
    if random.random() < 0.5:
        settings["staging_memory"] = random.randrange(1, total)
    if random.random() < 0.5:
        settings["device_memory"] = random.randrange(total, 3 * total)
    try:
        model = load(tmp_path, device, **settings)
    except AssertionError:  # what was drawn is too small for this one
        settings.pop("device_memory")
        model = load(tmp_path, device, **settings)
    with model:
        check_equal(resident, model, batches, device)
        check_equal(resident, model, batches[::-1], device)


@pytest.mark.parametrize("device", DEVICES)
def test_a_wrapped_module_computes_as_before(device: str, tmp_path: Path) -> None:
    module = nets.make(nets.Net).to(device)
    items = [batch.to(device) for batch in nets.batches(5)]
    expected = nets.serially(module, items)
    cache = {"cache": str(tmp_path)}
    with (
        nets.streamed(module, slots=3, device=device, io=cache),
        penstock.sweep(module) as sweep,
    ):
        found = sweep.map(module, items)
    assert nets.same(found, expected)


@pytest.mark.slow
@pytest.mark.parametrize("device", [pytest.param(NAME, marks=GPU)])
@pytest.mark.parametrize("tier", TIERS)
def test_no_memory_of_the_device_is_left_when_a_model_is_unwrapped(
    tier: str, device: str, tmp_path: Path
) -> None:
    zoo.save_checkpoint("llama", tmp_path)
    batch = on(device, zoo.inputs("llama"))

    def use() -> None:
        with load(tmp_path, device, **TIERS[tier]) as model, torch.inference_mode():
            logits_of(model, batch)

    use()  # what a runtime allocates once, for good
    gc.collect()
    before = allocated_bytes(device)
    for _ in range(3):
        use()
        gc.collect()
        assert allocated_bytes(device) == before

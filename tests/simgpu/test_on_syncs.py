"""The computing thread does not wait for the device while weights are streamed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import penstock
from checkpoint import make_checkpoint
from nets import Net, batches, make, same, serially
from on_device import GPU, TIERS
from penstock import Policy
from penstock.offload.tasks.task_progress import GenerateProgress, ScoreProgress
from sim_device import SimGpu
from test_on_tasks import PROMPTS, ROWS, SMALL

pytestmark = [pytest.mark.simgpu, pytest.mark.usefixtures("few_objects")]


def test_plain_calls_and_sweeps_never_wait(simgpu: SimGpu) -> None:
    """With any tier, and with activations that move out."""
    found: dict[str, str] = {}
    for seed, (tier, values) in enumerate(TIERS.items()):
        simgpu.schedule(seed)
        for activations in ("device", "host"):
            net = make(Net)
            items = batches(4, rows=300)
            expected = serially(net, items)
            there = [item.to(GPU) for item in items]
            policy = Policy(
                device=GPU,
                device_memory="40KiB",
                resident_below=1,
                activations=activations,
                **values,
            )
            with penstock.wrap(net, policy), penstock.sweep(net) as sweep:
                sweep.map(net, there)  # learns the order, allocates buffers
                try:
                    with simgpu.no_syncs():
                        swept = sweep.map(net, there)
                        plain = serially(net, there)
                except RuntimeError as error:
                    found[f"{tier}, {activations}"] = str(error)
                    continue
            assert same([x.cpu() for x in swept], expected), tier
            assert same([x.cpu() for x in plain], expected), tier
    assert not found


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return make_checkpoint(
        tmp_path / "tiny", "tiny", dtype="float32", shards_of="100KB"
    )


def test_scoring_waits_for_its_results_only(simgpu: SimGpu, folder: Path) -> None:
    """Once for each micro-batch; and at its beginning, where transformers asks whether
    several texts were packed into a row, and whether a mask hides anything."""
    with penstock.load(folder, Policy(device=GPU, **SMALL)) as model:
        list(penstock.score(model, ROWS["score"]))
        simgpu.schedule(1)
        before, progress = simgpu.syncs(this_thread=True), ScoreProgress()
        list(penstock.score(model, ROWS["score"] * 2, progress=progress))
        waits = simgpu.syncs(this_thread=True) - before
    num = progress.micro_batches_done
    assert num >= 4
    assert waits["copy"] == num
    assert waits["item"] <= 2 * num
    assert set(waits) <= {"copy", "item"}


def test_generating_waits_for_its_tokens_only(simgpu: SimGpu, folder: Path) -> None:
    """Twice for each micro-batch and new token: Penstock asks which rows have ended,
    transformers whether all have, and, of padded prompts, what the mask hides. The rest
    is at the beginning and the end."""
    waits: list[Any] = []
    with penstock.load(folder, Policy(device=GPU, **SMALL)) as model:
        for num_tokens in (3, 3, 8):
            before, progress = simgpu.syncs(this_thread=True), GenerateProgress()
            list(
                penstock.generate(
                    model, PROMPTS, max_new_tokens=num_tokens, progress=progress
                )
            )
            waits.append(simgpu.syncs(this_thread=True) - before)
            simgpu.schedule(num_tokens)
    num_steps = progress.micro_batches_done * 5
    assert progress.micro_batches_done >= 4
    steps = waits[2] - waits[1]
    assert steps.keys() == {"copy", "item"}
    assert steps["copy"] == num_steps <= steps["item"] <= 2 * num_steps

"""The computing thread does not wait for the device while weights are streamed."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from test_on_tasks import PROMPTS, ROWS, SMALL

import penstock
from checkpoint import make_checkpoint
from nets import Net, batches, make, same, serially
from on_device import GPU, TIERS
from penstock import Policy
from shares import shared
from sim_device import SimGpu

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


MANY = 3
"""How often the rows of a job repeat: at least 4 micro-batches share a pass."""
JOBS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "score": ("score", {}, {}),
    "embed": ("embed", {}, {}),
    "classify": ("classify", {}, {}),
    "greedy": ("generate", {"max_new_tokens": 4}, {"kv": {"tier": "device"}}),
    "greedy, kv in host memory": (
        "generate",
        {"max_new_tokens": 4},
        {"kv": {"tier": "host"}},
    ),
    "sampled": (
        "generate",
        {"max_new_tokens": 4, "do_sample": True, "seed": 3},
        {"kv": {"tier": "host"}},
    ),
}


@pytest.mark.parametrize(
    "name", shared(list(JOBS), lambda _, name: name in ("score", "greedy"))
)
def test_jobs_do_not_let_the_device_idle(
    simgpu: SimGpu, folder: Path, name: str
) -> None:
    """The computing thread waits for nothing but its last results: once at the end.

    What counts is a wait that can let the device idle. Results and the flags of rows
    that have ended are copied to pinned memory, and read when a later micro-batch has
    queued its work: such a wait is `covered` (see `SYNCS`), and bounds how far the host
    is ahead. Of several micro-batches, the last one of a pass reads its flags at its
    second site, after the others have queued theirs.
    """
    task, options, values = JOBS[name]
    rows = [{**row, "id": n} for n, row in enumerate(ROWS[task] * MANY)]
    policy = {**SMALL, "sequences_in_flight": 8, "tokens_in_flight": 128, **values}
    run = getattr(penstock, task)
    with penstock.load(folder, Policy(device="cpu", **policy)) as model:
        expected = list(run(model, rows, **options))
    with penstock.load(folder, Policy(device=GPU, **policy)) as model:
        list(run(model, rows[:2], **options))  # learns the order, allocates buffers
        simgpu.schedule(1)
        before = simgpu.syncs(this_thread=True)
        assert list(run(model, rows, **options)) == expected
        waits = simgpu.syncs(this_thread=True) - before
        del waits["covered"]
        assert waits <= Counter({"event": 1})


def test_a_micro_batch_alone_waits_for_its_tokens_only(
    simgpu: SimGpu, folder: Path
) -> None:
    """Once for each token but the last, and once for the results: whether its rows have
    ended decides if there is anything else to compute."""
    with penstock.load(folder, Policy(device=GPU, **SMALL)) as model:
        list(penstock.generate(model, PROMPTS[:1], max_new_tokens=2))
        simgpu.schedule(1)
        before = simgpu.syncs(this_thread=True)
        list(penstock.generate(model, PROMPTS[:1], max_new_tokens=6))
        waits = simgpu.syncs(this_thread=True) - before
    assert set(waits) <= {"event", "covered"}
    assert sum(waits.values()) <= 6

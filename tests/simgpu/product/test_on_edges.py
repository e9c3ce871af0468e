"""Each edge of the design, taken out on purpose, shows as wrong numbers.

An edge is a place in the library where a stream or a thread waits for an event. Here
the calls of one place do nothing, and within a few random schedules results differ. So
the simulated GPU would also show an edge that was forgotten.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from test_on_tasks import PROMPTS, SMALL

import penstock
from checkpoint import make_checkpoint
from nets import Net, batches, make, serially
from on_device import GPU
from penstock import Policy
from penstock.io.devices.accelerator import AcceleratorEvent, AcceleratorStream
from shares import shared
from sim_device import SimGpu

pytestmark = [pytest.mark.simgpu, pytest.mark.usefixtures("few_objects")]

NUM_SCHEDULES = 20
Results = list[Any]

EDGES: dict[str, tuple[str, ...]] = {
    "weights from disk": (
        "StagedSource.give_back",  # a part of staging memory is used again
        "Link._copy",  # a copy into a slot follows its last reader
    ),
    "weights from host memory": (
        "Link._copy",
        "LinkLoad.wait",  # computing follows the copy
    ),
    "activations": (
        "ActivationOffload.move_out",  # the copy out follows the kernels
        "ActivationOffload._free",  # the memory is freed after the copy out
        "ActivationOffload._fetch",  # the copy back follows what used the memory
        "ActivationOffload.bring_back",  # computing follows the copy back
    ),
    "keys and values in host memory": (
        "MemoryStorage.append",  # rows go to the host after they are computed
        "Leaving.add",  # and their memory is freed after that
        "MemoryStorage.fetch",  # rows come back into memory that is free by then
        "Arrival.wait",  # attention follows the rows
    ),
    "keys and values on disk": (
        "ThroughHost.out",
        "_Out.wait",  # a file is written after the copy
        "_Back.send",
    ),
}
"""By workload, the functions that wait. Not here: those that wait before memory is
given up or allocated, which are in test_on_freed.py."""
ELSEWHERE = {"PinnedPool.take"}


class Edges:
    """Which edges were used; the calls of `dropped` do nothing."""

    def __init__(self) -> None:
        self.used: set[str] = set()
        self.dropped = ""

    def keeps(self) -> bool:
        name = sys._getframe(2).f_code.co_qualname
        self.used.add(name)
        return name != self.dropped


@pytest.fixture
def edges(monkeypatch: pytest.MonkeyPatch) -> Edges:
    found = Edges()
    wait, block = AcceleratorStream.wait, AcceleratorEvent.wait

    def waits(self: AcceleratorStream, event: Any) -> None:
        if found.keeps():
            wait(self, event)

    def blocks(self: AcceleratorEvent) -> None:
        if found.keeps():
            block(self)

    monkeypatch.setattr(AcceleratorStream, "wait", waits)
    monkeypatch.setattr(AcceleratorEvent, "wait", blocks)
    return found


def sweeps(device: str, **values: Any) -> Results:
    """Results of two sweeps. On the CPU: of the resident module."""
    net, items = make(Net, 8), batches(4, values.pop("rows"))
    if device == "cpu":
        return serially(net, items) * 2
    there = [item.to(device) for item in items]
    policy = Policy(device=device, device_memory="20KiB", resident_below=1, **values)
    with penstock.wrap(net, policy), penstock.sweep(net, width=4) as sweep:
        found = sweep.map(net, there) + sweep.map(net, there)
        return [result.cpu() for result in found]


def completions(folder: Path, device: str, **kv: Any) -> Results:
    with penstock.load(folder, Policy(device=device, **SMALL, kv=kv)) as model:
        return list(penstock.generate(model, PROMPTS[:6], max_new_tokens=4))


def workloads(folder: Path) -> dict[str, Callable[[str], Results]]:
    return {
        "weights from disk": lambda device: sweeps(device, rows=2, staging_memory=1),
        "weights from host memory": lambda device: sweeps(
            device, rows=2, host_memory="1MiB"
        ),
        "activations": lambda device: sweeps(
            device, rows=300, host_memory="1MiB", activations="host"
        ),
        "keys and values in host memory": lambda device: completions(
            folder, device, tier="host"
        ),
        "keys and values on disk": lambda device: completions(
            folder, device, tier="disk", staging_memory="64KiB"
        ),
    }


def are_same(found: Results, expected: Results) -> bool:
    if found and isinstance(found[0], torch.Tensor):
        return all(map(torch.equal, found, expected))
    return found == expected


@contextmanager
def dropping(edges: Edges, name: str) -> Iterator[None]:
    edges.dropped = name
    try:
        yield
    finally:
        edges.dropped = ""


def is_caught(simgpu: SimGpu, run: Callable[[str], Results], expected: Results) -> bool:
    """Whether results differ in one of some random schedules, or something raises."""
    for seed in range(NUM_SCHEDULES):
        simgpu.schedule(seed)
        try:
            is_same = are_same(run(GPU), expected)
        except Exception:  # wrong ids may be out of range
            is_same = False
        if simgpu.take_error() or not is_same:
            return True
    return False


@pytest.mark.parametrize(
    "name",
    shared(list(EDGES), lambda _, name: name != "keys and values in host memory"),
)
def test_an_edge_that_is_missing_is_seen(
    simgpu: SimGpu, edges: Edges, tmp_path: Path, name: str
) -> None:
    folder = tmp_path / "tiny"
    if name.startswith("keys"):
        make_checkpoint(folder, "tiny", dtype="float32", shards_of="100KB")
    run = workloads(folder)[name]
    expected = run("cpu")
    simgpu.schedule(0)
    assert are_same(run(GPU), expected), "it is wrong with all edges"
    others = {edge for where in EDGES.values() for edge in where} | ELSEWHERE
    assert edges.used <= others, "an edge that this file does not know"
    missed = []
    for edge in EDGES[name]:
        assert edge in edges.used, "it does not reach that edge"
        with dropping(edges, edge):
            if not is_caught(simgpu, run, expected):
                missed.append(edge)
    assert not missed

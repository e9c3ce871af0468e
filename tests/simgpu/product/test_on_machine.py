"""The commands of `penstock`, with `device: simgpu:0`: it is measured, planned for,
tuned, verified, and does all tasks as the CPU does them."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from test_on_tasks import ROWS, SMALL

from checkpoint import make_checkpoint
from on_device import GPU
from penstock import Policy
from penstock.offload import cli
from penstock.offload.machines import (
    measure,
    measure_between,
    measure_calls,
    measure_products,
    rounds,
)
from penstock.offload.machines.machine import Machine
from penstock.offload.machines.measure_calls import Block
from sim_device import SimGpu

pytestmark = pytest.mark.simgpu

CAPACITY = 40 << 20
MACHINE = """
name: simulated
source: a test
device: simgpu
device_memory: 1GiB
host_memory: 8GiB
host_bandwidth: 10GB
matmul: {float32: {1: 2.0e9, 512: 1.0e11}}
disk: {bandwidth: {threads: 1GB}}
copies: {pinned_to_device: 10GB, pinned_to_host: 10GB, peer: 20GB}
"""
Command = Callable[..., tuple[int, str, str]]


@pytest.fixture
def penstock(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Command:
    """Runs the command line in this process: its exit code, and what it printed."""

    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["penstock", *map(str, arguments)])
        with pytest.raises(SystemExit) as left:
            cli.main()
        code = left.value.code
        assert isinstance(code, int)
        return code, *capsys.readouterr()

    return run


@pytest.fixture
def quickly(monkeypatch: pytest.MonkeyPatch) -> None:
    """Measurements of toy size, of the same kinds."""
    small = Block(hidden=64, intermediate=128, heads=4)
    monkeypatch.setattr(measure_between, "_LARGE", small)
    monkeypatch.setattr(measure_between, "_MIDDLE", small)
    monkeypatch.setattr(measure_products, "ROWS", (1, 8, 64))
    monkeypatch.setattr(measure_products, "LENGTHS", (32,))
    monkeypatch.setattr(measure_products, "_IN", 256)
    monkeypatch.setattr(measure_products, "_OUT", 512)
    monkeypatch.setattr(measure, "_MOST_SECONDS", 0.01)
    monkeypatch.setattr(measure, "_SCRATCH_BYTES", 192 << 20)
    monkeypatch.setattr(measure_between, "_DECODING", 2)
    monkeypatch.setattr(measure_between, "_NUM_STEPS", 2)
    monkeypatch.setattr(measure_calls, "_NUM_BATCHES", 2)
    monkeypatch.setattr(measure_calls, "_NUM_STEPS", 2)
    monkeypatch.setattr(rounds.rounds, "__defaults__", (1,))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return make_checkpoint(
        tmp_path / "tiny", "tiny", dtype="float32", shards_of="100KB"
    )


def told(penstock: Command, *arguments: object) -> dict[str, Any]:
    """What a command prints as JSON."""
    code, out, err = penstock(*arguments, "--json")
    assert code == 0, err
    found: dict[str, Any] = json.loads(out)
    return found


def test_a_small_device_is_measured_and_planned_for(
    simgpu: SimGpu, quickly: None, penstock: Command, tmp_path: Path, folder: Path
) -> None:
    """It has less memory than measurements take of a large one."""
    for device in range(2):
        simgpu.set_capacity(CAPACITY, device)
    simgpu.schedule(0, most_held_ops=0)
    code, _, err = penstock(
        "machine", "--device", GPU, "--disk", tmp_path, "-o", tmp_path / "m.yaml"
    )
    assert code == 0, err
    assert "device is the CPU" not in err
    machine = Machine.from_yaml(tmp_path / "m.yaml")
    assert (machine.device, machine.num_devices) == ("simgpu", 2)
    assert machine.device_memory == CAPACITY
    assert machine.copies is not None
    assert machine.copies.peer is not None
    assert set(machine.host_matmul) == {"float32", "bfloat16"}
    waits = []
    for factor in (1, 1000):  # slower links
        links = machine.copies.model_dump(exclude_none=True)
        own = {"copies": {way: rate // factor for way, rate in links.items()}}
        text = machine.model_copy(update=own).to_yaml()
        (tmp_path / "own.yaml").write_text(text)
        planned = told(
            *(penstock, "plan", folder, "--machine", tmp_path / "own.yaml"),
            *("--set", f"device={GPU}", "--set", "device_memory=300KiB"),
            *("--set", "logits_memory=1MiB"),
        )
        assert planned["policy"]["device"] == GPU
        assert planned["activation_bytes"] + (300 << 10) <= CAPACITY
        waits.append(planned["wait_seconds_per_pass"])
    assert waits[1] > 10 * waits[0]


TASKS: dict[str, tuple[str, ...]] = {
    "score": (),
    "embed": (),
    "classify": (),
    "generate": ("--max-new-tokens", "4"),
}


def test_commands_write_what_they_write_on_the_cpu(
    simgpu: SimGpu, penstock: Command, tmp_path: Path, folder: Path
) -> None:
    """Rows, one of them wrong; a policy in a file; a report."""
    simgpu.schedule(1)
    keys = {**SMALL, "activations": "host", "peer": {"simgpu:1": "100KiB"}}
    (tmp_path / "policy.yaml").write_text(yaml.safe_dump({"device": GPU, **keys}))
    for task, options in TASKS.items():
        source = tmp_path / f"{task}-in.jsonl"
        rows = [*ROWS[task], {"id": "wrong"}]
        source.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
        written = []
        for device, more in {
            "cpu": [part for key in SMALL for part in ("--set", f"{key}={SMALL[key]}")],
            GPU: ["--policy", str(tmp_path / "policy.yaml")],
        }.items():
            output = tmp_path / f"{task}-{device}.jsonl"
            report = tmp_path / f"{task}-{device}"
            code, _, err = penstock(
                *(task, folder, source, "-o", output, "--report", report),
                *("--set", "dtype=float32", *more, *options),
            )
            assert code == 1, err
            written.append(output.read_text())
        assert written[0] == written[1], task
        found = json.loads((report / "report.json").read_text())
        assert found["bytes_read"]["peer"] > 0
        assert found["peak_device_bytes"] >= found["device_memory_bytes"]
    code, out, err = penstock("verify", folder, "--policy", tmp_path / "policy.yaml")
    assert "equal, bit for bit" in out, err


def test_tuning_measures_on_the_device(
    simgpu: SimGpu, penstock: Command, tmp_path: Path, folder: Path
) -> None:
    (tmp_path / "machine.yaml").write_text(MACHINE)
    code, _, err = penstock(
        *("tune", folder, "--set", f"device={GPU}", "-o", tmp_path / "tuned.yaml"),
        *("--set", "device_memory=300KiB", "--prompt", "8"),
        *("--set", "tokens_in_flight=256", "--set", "io.reader=threads"),
        *("--machine", tmp_path / "machine.yaml"),
    )
    assert code == 0, err
    tuned = Policy.from_yaml(tmp_path / "tuned.yaml")
    assert tuned.device == GPU
    assert "on simulated, tuned" in (tmp_path / "tuned.yaml").read_text()
    assert " measured, rung 1, start: " in err

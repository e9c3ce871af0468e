"""Machines with several devices: what runs, apart from what is a formula."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from penstock.io.errors import PolicyError
from penstock.offload.cli import app
from penstock.offload.machines.machine import Machine, find_machine
from penstock.offload.plans.devices import DeviceOption
from penstock.offload.plans.plan import Plan, make_plan
from penstock.offload.plans.planned import Workload
from penstock.offload.policy import Policy

LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 8,
    "num_attention_heads": 16,
    "vocab_size": 4000,
    "dtype": "bfloat16",
}
MIXTRAL = {
    **LLAMA,
    "architectures": ["MixtralForCausalLM"],
    "model_type": "mixtral",
    "num_local_experts": 2,
    "num_hidden_layers": 2,
}
LOW: dict[str, Any] = {
    "host_memory": None,
    "device_memory": "256MiB",
    "tokens_in_flight": 512,
}


def runs_on_gpus() -> bool:
    """Whether ranks compute on GPUs."""
    with contextlib.suppress(PolicyError):
        return Policy(ranks="pipeline", device="cuda:0").ranks is not None
    return False


NAMES = {
    "one device": True,
    "others keep weights (peer)": True,
    "a job each (--workers 8)": True,
    "pipeline": runs_on_gpus(),
    "gather-stream": False,
    "TP-stream": False,
    "weight-stationary 1D": False,
    "weight-stationary 2D": False,
}


def eight(**values: Any) -> Machine:
    found = find_machine("8xh100-nvlink")
    assert found is not None
    return found.model_copy(update=values)


def planned(
    folder: Path,
    machine: Machine,
    config: dict[str, Any] = LLAMA,
    workload: Workload | None = None,
    **policy: Any,
) -> Plan:
    (folder / "config.json").write_text(json.dumps(config))
    return make_plan(folder, Policy(**policy), machine, workload or Workload())


def ways_of(made: Plan) -> dict[str, DeviceOption]:
    assert made.devices is not None
    return {way.name: way for way in made.devices.ways}


@pytest.mark.slow
def test_what_runs_is_told_apart_from_formulas(tmp_path: Path) -> None:
    made = planned(tmp_path, eight())
    ways = ways_of(made)
    assert {name: way.is_run for name, way in ways.items()} == NAMES
    alone, each = ways["one device"], ways["a job each (--workers 8)"]
    assert alone.pass_seconds == made.choice.prediction.pass_seconds
    assert each.tokens_per_second
    assert alone.tokens_per_second
    assert each.tokens_per_second < 8.05 * alone.tokens_per_second
    assert each.num_tokens == ways["TP-stream"].num_tokens
    assert made.devices is not None
    assert "2D layouts, which Penstock does not run" in made.devices.note
    assert made.devices.crossover_tokens == pytest.approx(
        made.choice.forecast.shape.flops_per_token / 2 / 8 / (4 * 2048)
    )


def test_jobs_read_the_drive_once_for_all(tmp_path: Path) -> None:
    made = planned(tmp_path, eight(), **LOW)
    ways = ways_of(made)
    alone, each = ways["one device"], ways["a job each (--workers 8)"]
    assert made.choice.prediction.binds == "disk"
    assert alone.pass_seconds
    assert each.pass_seconds == pytest.approx(alone.pass_seconds, rel=0.05)
    assert "the drive is read once for all" in each.note
    assert "if each reads all: io.read_once: false" in each.note


def test_jobs_share_the_drive(tmp_path: Path) -> None:
    """Without host memory for weights each job reads them all: eight times as much
    over one drive."""
    made = planned(tmp_path, eight(), io={"read_once": False}, **LOW)
    ways = ways_of(made)
    alone, each = ways["one device"], ways["a job each (--workers 8)"]
    assert made.choice.prediction.binds == "disk"
    assert alone.pass_seconds
    assert each.pass_seconds
    assert each.pass_seconds == pytest.approx(8 * alone.pass_seconds, rel=0.05)


def test_one_that_computes_is_faster_with_weights_on_the_others(tmp_path: Path) -> None:
    ways = ways_of(planned(tmp_path, eight(), **LOW))
    alone, peers = ways["one device"], ways["others keep weights (peer)"]
    assert alone.pass_seconds
    assert peers.pass_seconds
    assert peers.pass_seconds < alone.pass_seconds / 3
    assert "GB of weights on the others" in peers.note


@pytest.mark.slow
def test_what_is_too_large_to_stay_is_said(tmp_path: Path) -> None:
    small = eight(device_memory=4 * 10**8, num_devices=2)
    ways = ways_of(planned(tmp_path, small))
    stays, streams = ways["weight-stationary 1D"], ways["TP-stream"]
    assert stays.pass_seconds is None
    assert "does not fit" in stays.note
    assert streams.pass_seconds


@pytest.mark.slow
@pytest.mark.parametrize(
    ("config", "machine", "why"),
    [
        (MIXTRAL, {}, "without experts"),
        (LLAMA, {"network_bandwidth": None, "copies": None}, "no network_bandwidth"),
        (LLAMA, {"copies": None, "network_bandwidth": 10**11}, "no copies"),
    ],
)
def test_where_there_is_no_formula_it_says_why(
    config: dict[str, Any], machine: dict[str, Any], why: str, tmp_path: Path
) -> None:
    made = planned(tmp_path, eight(**machine), config)
    assert made.devices is not None
    assert why in made.devices.note
    assert made.devices.crossover_tokens is None
    formulas = [way for way in made.devices.ways if not way.is_run]
    assert {way.name for way in formulas} <= {"pipeline"}


def test_one_device_has_no_such_table(tmp_path: Path) -> None:
    machine = find_machine("h100-pcie5")
    assert machine is not None
    made = planned(tmp_path, machine)
    assert made.devices is None
    assert made.to_json()["devices"] is None


@pytest.mark.slow
def test_the_command_shows_them_and_json_has_them(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    run = CliRunner().invoke
    command = ["plan", str(tmp_path), "--machine", "8xh100-nvlink"]
    command += ["--task", "generate", "--set", "sequences_in_flight=64"]
    shown = run(app, command, env={"COLUMNS": "200"})
    assert shown.exit_code == 0, shown.output
    assert "8 devices" in shown.output
    assert "2D layouts, which Penstock does not run" in " ".join(shown.output.split())
    found = json.loads(run(app, [*command, "--json"]).output)["devices"]
    assert found["num_devices"] == 8
    assert {way["name"]: way["run_by"] == "penstock" for way in found["ways"]} == NAMES
    assert all(
        way["pass_seconds"] > 0 for way in found["ways"] if way["name"] != "pipeline"
    )

"""Plans for several ranks that share a model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from test_plan_devices import LLAMA, ways_of
from typer.testing import CliRunner

from penstock.io.errors import PolicyError, UsageError
from penstock.offload.cli import app
from penstock.offload.machines.machine import Machine, find_machine
from penstock.offload.machines.part_machine import part_of
from penstock.offload.plans.plan import Plan, make_plan
from penstock.offload.plans.planned import Workload
from penstock.offload.plans.ranked import (
    RankedPlanner,
    RankGroup,
    gathering_planner,
)
from penstock.offload.policy import Policy
from penstock.offload.tasks.generate_task import Generate
from penstock.scheduler.cost.worth import cost_per_million, utilisation

CPU = Machine(
    name="a CPU",
    source="made up",
    cores=4,
    num_threads=4,
    host_memory="8GiB",
    host_bandwidth="40GB",
    matmul={"bfloat16": {1: 1e10, 64: 1e12}, "float32": {1: 1e10, 64: 1e11}},
    disk={"bandwidth": {"threads": "100MB"}},
    network_bandwidth="1GB",
)
LOW: dict[str, Any] = {
    "device_memory": "512MiB",
    "tokens_in_flight": 1024,
    "micro_batch_tokens": 128,
}


def planned(
    folder: Path, group: RankGroup | None, config: dict[str, Any] = LLAMA, **policy: Any
) -> Plan:
    (folder / "config.json").write_text(json.dumps(config))
    given = Policy(**{**LOW, **policy})
    return make_plan(folder, given, CPU, Workload(), ranks=group, price_per_hour=3.6)


def test_ranks_on_two_machines_have_two_drives(tmp_path: Path) -> None:
    alone = planned(tmp_path, None)
    two = planned(tmp_path, RankGroup(2, 2))
    assert alone.choice.prediction.binds == two.choice.prediction.binds == "disk"
    ratio = alone.choice.prediction.pass_seconds / two.choice.prediction.pass_seconds
    assert ratio == pytest.approx(2.0, rel=0.1)
    assert two.policy.ranks == "pipeline"
    assert any("4 + 4 of its 8 blocks" in line for line in two.sentences)


def test_ranks_of_one_machine_share_its_drive(tmp_path: Path) -> None:
    alone = planned(tmp_path, None).choice.prediction.pass_seconds
    two = planned(tmp_path, RankGroup(2)).choice.prediction.pass_seconds
    assert two == pytest.approx(alone, rel=0.1)


def test_a_link_that_the_policy_limits_is_each_ranks(tmp_path: Path) -> None:
    links = {"disk": {"bandwidth": "20MB"}}
    alone = planned(tmp_path, None, links=links).choice.prediction.pass_seconds
    two = planned(tmp_path, RankGroup(2), links=links).choice.prediction.pass_seconds
    assert alone / two == pytest.approx(2.0, rel=0.1)


def test_all_ways_are_compared_and_those_that_run_say_how(tmp_path: Path) -> None:
    made = planned(tmp_path, RankGroup(2, 2))
    ways = ways_of(made)
    run = {name: way.how for name, way in ways.items() if way.is_run}
    started = "torchrun --nnodes 2 --nproc-per-node 1"
    assert run["pipeline"] == f"ranks: pipeline, {started}"
    assert run["a job each"].startswith("--workers 1, and a part of the rows")
    assert run["one process"] == ""
    assert run["gather"] == f"ranks: gather, {started}"
    assert run["tensor"] == f"ranks: tensor, {started}"
    assert {"gather-stream", "TP-stream"}.isdisjoint(ways)
    assert not ways["weight-stationary 2D"].is_run
    assert made.devices is not None
    alone, pipeline = ways["a job each"], ways["pipeline"]
    assert alone.tokens_per_second
    assert pipeline.tokens_per_second == pytest.approx(alone.tokens_per_second, rel=0.1)
    assert made.devices.best == ways["gather"]  # each reads half, with rows of its own
    assert "from more than 16 devices on" in made.devices.note
    found = made.to_json()
    assert found["devices"]["fastest"] == "gather"
    assert found["ranks"] == 2


def test_cost_and_utilisation_are_of_all_machines(tmp_path: Path) -> None:
    made = planned(tmp_path, RankGroup(2, 2))
    rate = made.choice.rate
    assert made.cost_per_million == pytest.approx(2 * 3.6 / 3600 / rate * 1e6)
    whole = made.planner
    assert isinstance(whole, RankedPlanner)
    flops = whole.whole.choose().forecast.shape.flops_per_token
    assert whole.flops_per_token(made.choice) == pytest.approx(flops)
    assert made.utilisation == pytest.approx(utilisation(rate, flops, 2 * 1e12))
    assert cost_per_million(None, rate) is None


def test_ranks_that_gather_read_a_part_each_and_have_rows_of_their_own(
    tmp_path: Path,
) -> None:
    alone = planned(tmp_path, None)
    two = gathering_planner(alone.planner, RankGroup(2, 2)).choose()
    assert alone.choice.prediction.binds == two.prediction.binds == "disk"
    ratio = alone.choice.prediction.pass_seconds / two.prediction.pass_seconds
    assert ratio == pytest.approx(2.0, rel=0.1)
    assert two.rate == pytest.approx(4 * alone.choice.rate, rel=0.1)
    drive = gathering_planner(alone.planner, RankGroup(2)).choose()
    assert drive.rate == pytest.approx(2 * alone.choice.rate, rel=0.1)


@pytest.mark.slow
def test_generation_is_planned_for_ranks_too(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    work = Workload(Generate(max_new_tokens=8), 32)
    policy = Policy(
        device_memory="512MiB", sequences_in_flight=16, micro_batch_sequences=4
    )
    alone = make_plan(tmp_path, policy, CPU, work)
    two = make_plan(tmp_path, policy, CPU, work, ranks=RankGroup(2, 2))
    assert two.choice.rate > 1.8 * alone.choice.rate
    kept = alone.choice.need.kv / two.choice.need.kv
    assert kept == pytest.approx(2.0, rel=0.1)  # each rank has those of its blocks


def test_a_part_of_a_cpu_has_a_part_of_its_cores() -> None:
    half = part_of(CPU, 2)
    assert (half.num_threads, half.host_memory) == (2, CPU.host_memory // 2)
    assert half.matmul["bfloat16"][64] == 5e11
    assert half.disk is not None
    assert half.disk.bandwidth == {"threads": 50_000_000}
    assert part_of(CPU, 1) is CPU


def test_what_cannot_be_shared_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="same number of ranks"):
        RankGroup(3, 2)
    with pytest.raises(UsageError, match="9 ranks cannot share a model of 8 blocks"):
        planned(tmp_path, RankGroup(9))
    gpus = find_machine("8xh100-nvlink")
    with pytest.raises(PolicyError, match="ranks: pipeline excludes"):
        make_plan(
            tmp_path,
            Policy(compile=True),
            gpus.model_copy(update={"device": "cpu"}) if gpus else None,
            Workload(),
            ranks=RankGroup(2),
        )


@pytest.mark.parametrize(
    "command",
    [
        ["plan", "{}", "--set", "ranks=pipeline"],
        ["plan", "{}", "--nodes", "2"],
        ["tune", "{}", "-o", "{}/tuned.yaml", "--set", "ranks=pipeline"],
        ["verify", "{}", "--set", "ranks=pipeline"],
    ],
)
def test_commands_of_one_process_refuse_ranks_in_a_sentence(
    command: list[str], tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    (tmp_path / "model.safetensors").write_bytes(b"")
    done = CliRunner().invoke(app, [part.format(tmp_path) for part in command])
    assert isinstance(done.exception, UsageError)
    assert "rank" in f"{done.exception}"

"""The benchmark of the planner's choice: its arithmetic, and that it runs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import planner as bench
from penstock.offload.policy import Policy

MACHINE = """
name: small
source: a test
host_memory: 8GiB
host_bandwidth: 10GB
matmul: {float32: {1: 2.0e+9, 512: 2.0e+11}}
disk: {bandwidth: {threads: 1GB, aiofiles: 900MB}}
"""


def test_a_machine_that_slows_down_leaves_the_adjusted_ratio_as_it_is() -> None:
    def at(speed: float) -> bench.Other:
        return bench.Other({}, 0.0, 90.0 * speed, 100.0 * speed, 100.0 * speed)

    found = bench.summary([at(1.0), at(0.5)], [100.0, 50.0, 50.0], [0.95, 0.9])
    assert found["planner_over_best_adjusted"] == pytest.approx(1 / 0.9)
    assert found["planner_over_best_raw"] == pytest.approx(50 / 90)
    assert found["planner_over_best_confirmed"] == pytest.approx(1 / 0.95)


def test_confirming_takes_laps_in_turn_with_the_planners_choice() -> None:
    mine, theirs = Policy(lookahead=1), Policy(lookahead=2)
    ran: list[int] = []

    def rate(policy: Policy) -> float:
        ran.append(policy.lookahead)
        return 100.0 * policy.lookahead

    other = bench.Other({"lookahead": 2}, 0.0, 1.0, 1.0, 1.0)
    assert bench.confirm(mine, [other], rate, 3) == [2.0]
    assert ran == [mine.lookahead, theirs.lookahead, mine.lookahead] * 3


@pytest.mark.whole
@pytest.mark.slow
def test_it_runs_and_ends_with_one_json_object(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    machine = tmp_path / "machine.yaml"
    machine.write_text(MACHINE)
    sizes = ["--shrink", "8", "--tokens", "64", "--length", "16", "--budget", "256MiB"]
    times = ["--policies", "3", "--every", "2", "--top", "1", "--laps", "1"]
    folders = ["--models", str(tmp_path / "models"), "--out", str(tmp_path / "out")]
    assert bench.main([*sizes, *times, *folders, "--machine", str(machine)]) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert found["policies"] == len(found["others"]) == 3
    assert found["failed"] == 0
    assert found["planner_over_best_confirmed"] > 0
    assert (tmp_path / "out" / "planner.json").exists()

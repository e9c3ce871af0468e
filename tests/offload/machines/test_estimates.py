"""Quick estimates: made once, remembered for a day, and marked as what they are."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch

from checkpoints import write_checkpoint
from penstock.io.checkpoint.index import open_checkpoint
from penstock.offload.machines import estimates
from penstock.offload.machines.estimates import (
    DAY,
    RememberedEstimates,
    estimated_machine,
)
from penstock.offload.machines.machine import Machine
from penstock.offload.policy import IO


def remembered(path: Path, now: float) -> RememberedEstimates:
    return RememberedEstimates(path, lambda: now)


@pytest.fixture
def values() -> Callable[[], int]:
    numbers: Iterator[int] = count(1)
    return lambda: next(numbers)


def test_an_estimate_is_made_once_and_again_after_a_day(
    tmp_path: Path, values: Callable[[], int]
) -> None:
    path = tmp_path / "cache" / "estimates.json"
    first = remembered(path, 1000.0)
    assert (first.get_or("x", values), first.get_or("x", values)) == (1, 1)
    first.keep()
    again = remembered(path, 1000.0 + DAY - 1)
    assert (again.get_or("x", values), again.num_new) == (1, 0)
    assert again.get_or("y", values) == 2
    old = remembered(path, 1000.0 + DAY)
    assert (old.get_or("x", values), old.num_new) == (3, 1)
    assert remembered(path, 0.0).get_or("x", values) == 4, "one of the future is none"


def test_what_is_remembered_says_that_it_is_an_estimate(
    tmp_path: Path, values: Callable[[], int]
) -> None:
    path = tmp_path / "estimates.json"
    found = remembered(path, 0.0)
    found.get_or("x", values)
    found.keep()
    assert json.loads(path.read_text())["what"].startswith("Quick estimates")


@pytest.mark.parametrize("text", ["", "[1]", '{"a": 1}', "\x00"])
def test_a_damaged_file_and_a_folder_that_cannot_be_written_do_no_harm(
    tmp_path: Path, values: Callable[[], int], text: str
) -> None:
    path = tmp_path / "estimates.json"
    path.write_text(text)
    assert remembered(path, 0.0).get_or("x", values) == 1
    blocked = remembered(path / "no folder" / "estimates.json", 0.0)
    assert blocked.get_or("x", values) == 2
    blocked.keep()


@pytest.mark.usefixtures("no_leaks")
def test_a_machine_of_estimates_has_what_a_plan_needs_and_says_what_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(estimates, "_SIZE", 16)
    monkeypatch.setattr(estimates, "_COPIED_BYTES", 1 << 16)
    made = {"w": torch.zeros(300, 100)}
    files = open_checkpoint(write_checkpoint(tmp_path, made)).stamps
    io = IO(cache=tmp_path / "cache")
    found = estimated_machine(["bfloat16", "float32"], files, io, clock=lambda: 5.0)
    assert found.is_estimate
    assert found.source.startswith("quick estimate, measured in")
    assert set(found.matmul) == {"bfloat16", "float32"}
    for by_rows in found.matmul.values():
        assert list(by_rows.values()) == sorted(by_rows.values())
    assert found.disk is not None
    assert found.disk.bandwidth[found.disk.best_reader] > 0
    again = estimated_machine(["float32"], files, io, clock=lambda: 6.0)
    assert again.source.startswith("quick estimate, of the last 24 hours")
    assert again.matmul["float32"] == found.matmul["float32"]
    assert again.disk is not None
    assert again.disk.bandwidth == found.disk.bandwidth
    assert found.disk.free is not None
    assert found.disk.capacity is not None
    assert 0 < found.disk.free <= found.disk.capacity


def test_a_machine_file_says_only_of_estimates_that_they_are(tmp_path: Path) -> None:
    values: dict[str, Any] = {"name": "a", "source": "b", "host_memory": 1}
    values["matmul"] = {"float32": {1: 1e9}}
    path = tmp_path / "machine.yaml"
    path.write_text(Machine(**values).to_yaml())
    assert "is_estimate" not in path.read_text()
    path.write_text(Machine(**values, is_estimate=True).to_yaml())
    assert Machine.from_yaml(path).is_estimate

"""torch's profiler shows what the simulated GPU does, as it does for CUDA."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from on_device import GPU
from sim_device import SimGpu

pytestmark = [pytest.mark.simgpu]


def events_of(path: Path) -> list[dict[str, Any]]:
    found = json.loads(path.read_text())["traceEvents"]
    return [event for event in found if event.get("ph") == "X"]


def test_a_trace_has_kernels_copies_and_waits(simgpu: SimGpu, tmp_path: Path) -> None:
    pinned, pageable = torch.ones(8).pin_memory(), torch.ones(8)
    side = torch.Stream(GPU)
    for _ in range(2):  # a second recording starts from nothing
        activities = [ProfilerActivity.CPU, ProfilerActivity.PrivateUse1]
        with profile(activities=activities) as profiler:
            there = pinned.to(GPU, non_blocking=True)
            (there @ there).item()
            with side:
                there.copy_(pageable)
            torch.accelerator.synchronize()
        profiler.export_chrome_trace(str(tmp_path / "trace.json"))
    events = events_of(tmp_path / "trace.json")
    by_kind = {
        kind: [event for event in events if event["cat"] == kind]
        for kind in ("kernel", "gpu_memcpy", "privateuse1_runtime")
    }
    assert "aten::dot" in [event["name"] for event in by_kind["kernel"]]
    assert [(event["name"], event["tid"]) for event in by_kind["gpu_memcpy"]] == [
        ("Memcpy HtoD (Pinned -> Device)", 0),
        ("Memcpy HtoD (Pageable -> Device)", side.stream_id),
    ]
    waits = {event["name"] for event in by_kind["privateuse1_runtime"]}
    assert waits == {"simgpuMemcpy", "simgpuDeviceSynchronize"}
    me = threading.get_native_id()
    assert all(event["tid"] == me for event in by_kind["privateuse1_runtime"])
    assert all(event["dur"] >= 0 for event in events)

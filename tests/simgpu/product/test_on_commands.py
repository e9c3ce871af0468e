"""What is done beside jobs, on the simulated GPU; and what goes wrong there."""

from __future__ import annotations

import gc
import json
import os
import threading
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from test_on_tasks import ROWS, SMALL

import penstock
from checkpoint import make_checkpoint
from nets import Net, batches, make, same, serially
from on_device import GPU
from penstock import DoesNotFitError, PenstockError, Policy
from penstock.io.devices.accelerator import (
    AcceleratorDevice,
    AcceleratorEvent,
    AcceleratorStream,
)
from penstock.offload import verify
from penstock.offload.files.inputs import Inputs
from penstock.offload.files.json_rows import SCORED_KEYS
from penstock.offload.files.sources import Own, find_files
from penstock.offload.quality.stages import Stages
from penstock.offload.quality.texts import Texts, compare_texts
from sim_device import SimGpu

pytestmark = pytest.mark.simgpu


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return make_checkpoint(
        tmp_path / "tiny", "tiny", dtype="float32", shards_of="100KB"
    )


@pytest.mark.parametrize("fits", [True, False])
def test_verify_compares_with_weights_on_the_same_device(
    simgpu: SimGpu, folder: Path, fits: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the resident model, or, where it does not fit, unit by unit."""
    if not fits:
        monkeypatch.setattr(verify, "memory_of", lambda name: (1 << 10, 1 << 30))
    simgpu.schedule(1)
    policy = Policy(device=GPU, device_memory="220KiB", resident_below=10)
    result = verify.verify(folder, policy)
    assert result.is_equal, result.differences
    assert result.reference.startswith("transformers'" if fits else "safetensors")


def test_texts_are_compared_on_the_device(
    simgpu: SimGpu, folder: Path, tmp_path: Path
) -> None:
    """As on the CPU, bit for bit."""
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps(row) + "\n" for row in ROWS["score"]))
    stages = Stages(Console(quiet=True))
    found = []
    for device in ("cpu", GPU):
        simgpu.schedule(1)
        policy = Policy(**{**SMALL, "device": device, "dtype": "float32"})
        texts = Texts(Inputs(find_files([rows], Own()), SCORED_KEYS))
        found.append(compare_texts(folder, folder, policy, texts, stages))
    assert found[0] == found[1]
    assert found[0].is_identical
    assert found[0].tokens > 20


def test_a_device_that_is_too_small_is_said_and_can_be_used_again(
    simgpu: SimGpu, folder: Path
) -> None:
    """At the working set, and in the middle of filling another device."""
    with penstock.load(folder, Policy(**SMALL)) as model:
        expected = list(penstock.score(model, ROWS["score"]))
    values: dict[str, Any] = {**SMALL, "device": GPU, "device_memory": "400KiB"}
    values["peer"] = {"simgpu:1": "500KiB"}
    for device in range(2):
        torch.accelerator.empty_cache()
        simgpu.set_capacity(8 << 20, device)
        free, _ = torch.accelerator.get_memory_info(device)
        others = torch.empty(
            free - (64 << 10), dtype=torch.uint8, device=f"simgpu:{device}"
        )
        with pytest.raises(DoesNotFitError, match=f"simgpu:{device}.*bytes free"):
            penstock.load(folder, Policy(**values))
        del others
        simgpu.set_capacity(1 << 30, device)
        gc.collect()
        for index in range(2):
            assert torch.accelerator.memory_allocated(index) == 0, "memory is left"
    with penstock.load(folder, Policy(**values)) as model:
        assert list(penstock.score(model, ROWS["score"])) == expected


def test_memory_that_runs_out_anywhere_leaves_nothing(
    simgpu: SimGpu, folder: Path
) -> None:
    """While a model is loaded, in a forward, in the middle of a job."""
    policy = Policy(**{**SMALL, "device": GPU, "device_memory": "400KiB"})

    def scored() -> list[dict[str, Any]]:
        with penstock.load(folder, policy) as model:
            return list(penstock.score(model, ROWS["score"]))

    expected = scored()
    gc.collect()
    torch.accelerator.empty_cache()
    simgpu.set_capacity(8 << 20)
    began = threading.active_count(), len(os.listdir("/proc/self/fd"))
    ends: Counter[str] = Counter()
    small, large = range(64, 768, 88), range(768, 4096, 832)
    for capacity in (kibibytes << 10 for kibibytes in (*small, *large)):
        simgpu.schedule(capacity)
        free, _ = torch.accelerator.get_memory_info(0)
        others = torch.empty(free - capacity, dtype=torch.uint8, device=GPU)
        try:
            rows = scored()
        except (DoesNotFitError, torch.OutOfMemoryError):
            ends["refused"] += 1
        else:
            whole = [row for row in rows if "error" not in row]
            assert all(row in expected for row in whole)
            ends["whole" if whole == expected else "in part"] += 1
        del others
        gc.collect()
        assert torch.accelerator.memory_allocated(0) == 0, capacity
        torch.accelerator.empty_cache()
        assert (threading.active_count(), len(os.listdir("/proc/self/fd"))) == began
    assert ends["refused"] > 2
    assert ends["whole"] > 2


def test_a_copy_that_fails_is_raised_and_the_module_can_be_streamed_again(
    simgpu: SimGpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    net, items = make(Net), batches(3)
    expected = serially(net, items)
    there = [item.to(GPU) for item in items]
    policy = Policy(device=GPU, device_memory="20KiB", resident_below=1)
    copy, num_copies = AcceleratorStream.copy, 0

    def failing(
        self: AcceleratorStream, target: torch.Tensor, source: torch.Tensor
    ) -> None:
        nonlocal num_copies
        num_copies += 1
        if num_copies == 9:
            raise RuntimeError("the link is down")
        copy(self, target, source)

    for seed in range(3):
        simgpu.schedule(seed)
        num_copies = 0
        with monkeypatch.context() as patch:
            patch.setattr(AcceleratorStream, "copy", failing)
            with (
                penstock.wrap(net, policy),
                pytest.raises(PenstockError, match=r"not be copied: .*link is down"),
            ):
                serially(net, there * 3)
        with penstock.wrap(net, policy):
            assert same([x.cpu() for x in serially(net, there)], expected)
        assert same(serially(net, items), expected)


def test_a_module_comes_back_from_a_device_that_has_failed(
    simgpu: SimGpu, caplog: pytest.LogCaptureFixture
) -> None:
    """An index out of range, which the device finds when the kernel runs. The error
    stays, as on CUDA."""
    net, items = make(Net), batches(3)
    expected = serially(net, items)
    there = [item.to(GPU) for item in items]
    policy = Policy(device=GPU, device_memory="1MiB", resident_below="1MiB")
    table, place = torch.zeros(4, 4, device=GPU), torch.tensor([9], device=GPU)
    penstock.wrap(net, policy)
    serially(net, there)
    torch.embedding(table, place)
    with pytest.raises(RuntimeError):
        torch.accelerator.synchronize()
    penstock.unwrap(net)
    assert "cannot be read any more" in caplog.text
    assert "while the model was closed" in caplog.text
    assert same(serially(net, items), expected)
    assert simgpu.take_error()
    with penstock.wrap(net, policy):
        assert same([x.cpu() for x in serially(net, there)], expected)
    assert same(serially(net, items), expected)


def test_streams_and_events_are_torchs_own_classes(simgpu: SimGpu) -> None:
    """torch does not check the class: `torch.Stream` would wait for what an event of a
    subclass, such as torch.cuda.Event, has in the same place of its memory."""
    device = AcceleratorDevice(GPU)
    for stream in (device.compute, device.stream()):
        event = stream.record()
        assert isinstance(event, AcceleratorEvent)
        assert type(event.event) is torch.Event
        assert type(stream._stream) is torch.Stream
    assert not simgpu.take_error()


class Target:
    """A tensor whose copy ends when it is told to."""

    def __init__(self) -> None:
        self.begun, self.may_end = threading.Event(), threading.Event()

    def copy_(self, source: torch.Tensor, *, non_blocking: bool) -> None:
        self.begun.set()
        assert self.may_end.wait(10)


def test_threads_that_copy_on_one_stream_keep_their_own_streams(
    simgpu: SimGpu,
) -> None:
    """The first to begin is the first to end, within the copy of the second."""
    stream, source = AcceleratorDevice(GPU).stream(), torch.zeros(1)
    targets, changed = [Target(), Target()], []

    def copy(target: Any) -> None:
        own = torch.Stream(GPU)
        torch.accelerator.set_stream(own)
        stream.copy(target, source)
        if torch.accelerator.current_stream() != own:
            changed.append(target)

    threads = [threading.Thread(target=copy, args=(target,)) for target in targets]
    for thread, target in zip(threads, targets, strict=True):
        thread.start()
        assert target.begun.wait(10)
    for thread, target in zip(threads, targets, strict=True):
        target.may_end.set()
        thread.join()
    assert changed == []
    assert not simgpu.take_error()

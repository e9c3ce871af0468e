"""Streams of the simulated GPU run late, each in its own order: what does not wait for
them is found out."""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest
import torch

from sim_device import SimGpu

pytestmark = pytest.mark.simgpu
GPU = "simgpu:0"
SEEDS = range(12)


def copied_and_summed(seed: int, with_edge: bool) -> float:
    """The sum of a slot that is filled on a side stream, with ones, and then read. The
    slot held twos before. The reader waits for the copy, or it does not."""
    source = torch.ones(64).pin_memory()
    slot = torch.full((64,), 2.0, device=GPU)
    side = torch.Stream(GPU)
    torch.accelerator.synchronize()
    with side:
        slot.copy_(source, non_blocking=True)
    event = side.record_event()
    if with_edge:
        torch.accelerator.current_stream().wait_event(event)
    return float(slot.sum())


def reused(seed: int, with_edge: bool) -> float:
    """The sum of ones in a slot that is filled with twos once they are summed: the copy
    on a side stream waits for the reader, or it does not."""
    twos = torch.full((64,), 2.0).pin_memory()
    slot = torch.ones(64, device=GPU)
    side = torch.Stream(GPU)
    torch.accelerator.synchronize()
    total = (slot * 1).sum()
    event = torch.accelerator.current_stream().record_event()
    if with_edge:
        side.wait_event(event)
    with side:
        slot.copy_(twos, non_blocking=True)
    side.synchronize()
    return float(total)


CASES = pytest.mark.parametrize("case", [copied_and_summed, reused])
Case = Callable[[int, bool], float]


def results(simgpu: SimGpu, case: Case, with_edge: bool) -> list[float]:
    made = []
    for seed in SEEDS:
        simgpu.schedule(seed)
        made.append(case(seed, with_edge))
    return made


@CASES
def test_a_missing_wait_gives_wrong_numbers(simgpu: SimGpu, case: Case) -> None:
    assert set(results(simgpu, case, with_edge=False)) != {64}


@CASES
def test_with_the_wait_they_are_always_right(simgpu: SimGpu, case: Case) -> None:
    assert set(results(simgpu, case, with_edge=True)) == {64}


def test_a_call_does_not_wait_for_its_kernel(simgpu: SimGpu) -> None:
    stream = torch.accelerator.current_stream()
    tensor = torch.ones(8, device=GPU)
    stream.synchronize()
    with simgpu.no_syncs(), simgpu.held(stream):
        tensor.mul_(3)
        assert not stream.query()
    assert tensor.tolist() == [3] * 8


def test_an_event_passes_when_the_work_before_it_is_done(simgpu: SimGpu) -> None:
    stream = torch.Stream(GPU)
    event = torch.Event(GPU)
    assert event.query()
    with simgpu.held(stream):
        event.record(stream)
        assert not event.query()
        event.synchronize()  # somebody waits, so it goes on
        assert event.query()


def test_whoever_waits_makes_those_go_on_that_it_depends_on(simgpu: SimGpu) -> None:
    first, second = torch.Stream(GPU), torch.Stream("simgpu:1")
    with simgpu.held(first), simgpu.held(second):
        second.wait_event(first.record_event())
        last = second.record_event()
        assert not last.query()
        last.synchronize()
        assert first.query()


def test_an_event_that_is_recorded_again_is_waited_for_as_it_was(
    simgpu: SimGpu,
) -> None:
    stream = torch.accelerator.current_stream()
    side = torch.Stream(GPU)
    event = torch.Event(GPU)
    event.record(stream)
    side.wait_event(event)
    with simgpu.held(stream):
        event.record(stream)
        side.synchronize()
        assert not event.query()


def test_events_measure_time(simgpu: SimGpu) -> None:
    first = torch.Event(GPU, enable_timing=True)
    last = torch.Event(GPU, enable_timing=True)
    first.record()
    torch.ones(8, device=GPU)
    last.record()
    last.synchronize()
    assert first.elapsed_time(last) > 0


def test_the_current_stream_belongs_to_a_thread(simgpu: SimGpu) -> None:
    side = torch.Stream(GPU)
    found = []

    def look() -> None:
        found.append(torch.accelerator.current_stream().stream_id)

    with side:
        thread = threading.Thread(target=look)
        thread.start()
        thread.join()
        look()
    assert found == [0, side.stream_id]


def test_syncs_are_counted_by_reason(simgpu: SimGpu) -> None:
    tensor = torch.ones(4, device=GPU)
    host = torch.ones(4)
    pinned = host.pin_memory()
    module = torch.get_device_module("simgpu")
    event = torch.Event(GPU)
    event.record()
    before = simgpu.syncs()
    assert before == {}
    tensor.copy_(pinned, non_blocking=True)
    pinned.copy_(tensor, non_blocking=True)
    tensor[0] = tensor.sum()
    assert simgpu.syncs() == {}
    tensor.sum().item()
    tensor.nonzero()
    tensor[tensor > 0]
    tensor.cpu()
    tensor.copy_(host, non_blocking=True)  # not pinned
    tensor.copy_(pinned)
    torch.accelerator.current_stream().synchronize()
    torch.accelerator.synchronize()
    event.synchronize()  # it has passed
    with simgpu.held(torch.accelerator.current_stream()):
        tensor.add_(1)
        event.record()
        event.synchronize()
    module.empty_cache()
    assert simgpu.syncs() == {
        "item": 1,
        "shape": 2,
        "copy": 3,
        "stream": 1,
        "device": 1,
        "event": 1,
        "allocator": 2,  # it waits for both devices
    }


def test_a_wait_with_work_behind_it_is_covered(simgpu: SimGpu) -> None:
    tensor = torch.ones(4, device=GPU)
    event = torch.Event(GPU)
    for num_behind in (15, 16):
        with simgpu.held(torch.accelerator.current_stream()):
            event.record()
            for _ in range(num_behind):
                tensor.add_(1)
            event.synchronize()
    with simgpu.no_syncs(), simgpu.held(torch.accelerator.current_stream()):
        event.record()
        for _ in range(16):
            tensor.add_(1)
        event.synchronize()
    assert simgpu.syncs() == {"event": 1, "covered": 2}


def test_syncs_are_counted_by_thread(simgpu: SimGpu) -> None:
    thread = threading.Thread(target=torch.accelerator.synchronize)
    thread.start()
    thread.join()
    assert simgpu.syncs()["device"] == 1
    assert simgpu.syncs(this_thread=True) == {}


@pytest.mark.parametrize("wait", [torch.Tensor.cpu, torch.Tensor.item])
def test_syncs_can_be_forbidden(
    simgpu: SimGpu, wait: Callable[[torch.Tensor], object]
) -> None:
    tensor = torch.ones((), device=GPU)
    with (
        simgpu.no_syncs(),
        pytest.raises(RuntimeError, match="called a synchronizing operation"),
    ):
        wait(tensor)
    wait(tensor)


def test_a_kernel_that_fails_is_noticed_later(simgpu: SimGpu) -> None:
    table = torch.ones(4, 2, device=GPU)
    far = torch.tensor([9], device=GPU)
    torch.nn.functional.embedding(far, table)
    with pytest.raises(RuntimeError, match="index out of range"):
        torch.accelerator.synchronize()
    assert "index out of range" in simgpu.take_error()
    torch.accelerator.synchronize()


def test_wrong_shapes_are_refused_at_once(simgpu: SimGpu) -> None:
    with pytest.raises(RuntimeError, match="broadcast"):
        torch.ones(3, device=GPU) + torch.ones(4, device=GPU)


def test_copies_between_devices_are_in_order_with_both(simgpu: SimGpu) -> None:
    for seed in SEEDS:
        simgpu.schedule(seed)
        source = torch.zeros(64, device=GPU)
        target = torch.zeros(64, device="simgpu:1")
        source.fill_(1)
        target.fill_(5)
        target.copy_(source, non_blocking=True)
        source.fill_(7)
        target.add_(1)
        assert target.sum().item() == 128


def test_a_side_stream_fills_a_peer_without_the_hosts_waiting(simgpu: SimGpu) -> None:
    source = torch.ones(64, device="simgpu:1")
    target = torch.zeros(64, device=GPU)
    torch.accelerator.synchronize(1)
    side = torch.Stream("simgpu:1")
    with simgpu.no_syncs():
        with side:
            target.copy_(source, non_blocking=True)
        torch.accelerator.current_stream().wait_event(side.record_event())
        total = target.sum()
    assert total.item() == 64


def test_streams_come_from_a_pool(simgpu: SimGpu) -> None:
    ids = [torch.Stream(GPU).stream_id for _ in range(33)]
    assert ids[0] == ids[32]
    assert len(set(ids)) == 32


def test_indices_of_the_host_are_waited_for(simgpu: SimGpu) -> None:
    tensor = torch.arange(4, device=GPU)
    picked = tensor[torch.tensor([3, 1])]
    assert simgpu.syncs() == {"copy": 1}
    assert picked.tolist() == [3, 1]

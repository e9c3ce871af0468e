"""Memory that is freed or used again while a copy of another stream is still to come:
what waits for it, and what would go wrong without."""

from __future__ import annotations

import pytest
import torch

from on_device import GPU
from penstock.io.closing import Closing
from penstock.io.devices.accelerator import AcceleratorDevice, AcceleratorMemory
from penstock.io.kv.buffer_pool import PinnedPool
from penstock.io.kv.host_bounce import ThroughHost
from penstock.io.memory.arena import Arena
from sim_device import SimGpu

pytestmark = [pytest.mark.simgpu, pytest.mark.usefixtures("few_objects")]

NUM = 1 << 20


class Registered(Closing):
    """Pinned memory that must not be given up before `events` have passed."""

    def __init__(self, arena: Arena, events: list[torch.Event]) -> None:
        self._events = events
        self._address = arena.view(0, arena.nbytes)
        self._host = arena.tensor(0, arena.nbytes)
        runtime = torch.get_device_module("simgpu").cudart()
        assert runtime.cudaHostRegister(self._host.data_ptr(), arena.nbytes) == 0

    def close(self) -> None:
        assert all(event.query() for event in self._events), "it is still copied"
        runtime = torch.get_device_module("simgpu").cudart()
        runtime.cudaHostUnregister(self._host.data_ptr())
        del self._address, self._host


def test_pinned_memory_is_given_up_after_copies_that_nobody_wants(
    simgpu: SimGpu,
) -> None:
    """A micro-batch ends while its rows are fetched ahead: the copy is still to come
    when a larger buffer takes the place of the one that it reads."""
    device = AcceleratorDevice(GPU)
    out, back = device.stream(), device.stream()
    events: list[torch.Event] = []
    pool = PinnedPool(lambda arena: Registered(arena, events), out, back)
    buffer = pool.take(NUM)
    target = torch.empty(NUM, dtype=torch.uint8, device=GPU)
    with simgpu.held(back._stream):
        back.copy(target, buffer.tensor(0, NUM))
        copied = back.record()
        events.append(copied.event)  # type: ignore[attr-defined]
        pool.give_back(buffer)
        pool.take(4 * NUM)
    device.synchronize()
    pool.close()


def test_rows_that_leave_are_freed_after_they_have_left(simgpu: SimGpu) -> None:
    """With the writing thread late: its own wait for the copy comes too late for the
    allocator, which gives the rows' memory to the computing stream."""
    device = AcceleratorDevice(GPU)
    out, back = device.stream(), device.stream()
    bounce = ThroughHost(device, out, back, lambda arena: Registered(arena, []))
    leaving = []
    with simgpu.held(out._stream):
        for value in range(1, 7):
            rows = torch.full((NUM,), value, dtype=torch.uint8, device=GPU)
            leaving.append(bounce.out(rows))
            del rows
    found = [outgoing.wait()[:4].tolist() for outgoing in leaving]
    assert found == [[value] * 4 for value in range(1, 7)]
    for outgoing in leaving:
        outgoing.close()
    bounce.close()


def test_allocated_memory_is_written_after_its_last_user(simgpu: SimGpu) -> None:
    """The allocator gives out memory that the computing stream still writes to; the
    copies to come run on another stream."""
    device = AcceleratorDevice(GPU)
    side = device.stream()
    data = torch.full((NUM,), 7, dtype=torch.uint8).pin_memory()
    old = torch.empty(NUM, dtype=torch.uint8, device=GPU)
    address = old.data_ptr()
    with simgpu.held(torch.accelerator.current_stream()):
        old.fill_(1)
        del old
        memory = AcceleratorMemory(NUM, torch.device(GPU))
        new = memory.tensor(0, NUM)
        assert new.data_ptr() == address
        side.copy(new, data)
        side.record().wait()
    device.synchronize()
    assert torch.equal(new.cpu(), data)
    del new
    memory.close()

"""Host memory for the simulated GPU: pinned by torch, by address, or not at all."""

from __future__ import annotations

import mmap

import numpy as np
import pytest
import torch

from sim_device import SimGpu

pytestmark = pytest.mark.simgpu
GPU = "simgpu:0"
PAGE = mmap.PAGESIZE


def mapped(num_bytes: int) -> torch.Tensor:
    """Bytes that lie on whole pages."""
    return torch.from_numpy(np.frombuffer(mmap.mmap(-1, num_bytes), dtype=np.uint8))


def test_torch_pins_memory(simgpu: SimGpu) -> None:
    tensor = torch.arange(6)
    pinned = tensor.pin_memory()
    assert not tensor.is_pinned()
    assert pinned.is_pinned()
    assert pinned[2:4].is_pinned()
    assert pinned.tolist() == tensor.tolist()
    assert torch.empty(4, pin_memory=True).is_pinned()


def test_a_copy_to_pinned_memory_arrives_later(simgpu: SimGpu) -> None:
    pinned = torch.zeros(4).pin_memory()
    tensor = torch.ones(4, device=GPU)
    stream = torch.accelerator.current_stream()
    with simgpu.held(stream):
        pinned.copy_(tensor, non_blocking=True)
        assert pinned.tolist() == [0] * 4
        stream.synchronize()
        assert pinned.tolist() == [1] * 4


def test_pinned_memory_is_read_when_the_copy_runs(simgpu: SimGpu) -> None:
    pinned = torch.ones(4).pin_memory()
    with simgpu.held(torch.accelerator.current_stream()):
        tensor = pinned.to(GPU, non_blocking=True)
        pinned.fill_(3)
    assert tensor.tolist() == [3] * 4


def test_other_memory_is_read_before_the_call_returns(simgpu: SimGpu) -> None:
    host = torch.ones(4)
    with simgpu.held(torch.accelerator.current_stream()):
        tensor = host.to(GPU, non_blocking=True)
        host.fill_(3)
    assert tensor.tolist() == [1] * 4


def test_pinned_memory_is_not_used_again_while_a_copy_reads_it(simgpu: SimGpu) -> None:
    pinned = torch.ones(4).pin_memory()
    address = pinned.data_ptr()
    stream = torch.accelerator.current_stream()
    with simgpu.held(stream):
        tensor = pinned.to(GPU, non_blocking=True)
        del pinned
        other = torch.zeros(4, pin_memory=True)
        assert other.data_ptr() != address
        stream.synchronize()
    assert tensor.tolist() == [1] * 4
    assert torch.empty(4, pin_memory=True).data_ptr() == address


def test_registered_memory_is_pinned_until_it_is_unregistered(simgpu: SimGpu) -> None:
    runtime = torch.get_device_module("simgpu").cudart()
    host = mapped(2 * PAGE)
    assert runtime.cudaHostRegister(host.data_ptr(), PAGE, 1) == 0
    assert runtime.cudaHostRegister(host.data_ptr(), PAGE, 1) == 712
    assert host.is_pinned()
    host[:4] = 5
    target = torch.empty(PAGE, dtype=torch.uint8, device=GPU)
    with simgpu.no_syncs():
        target.copy_(host[:PAGE], non_blocking=True)
    assert target[:4].tolist() == [5] * 4
    assert runtime.cudaHostUnregister(host.data_ptr()) == 0
    assert runtime.cudaHostUnregister(host.data_ptr()) == 713
    assert not host.is_pinned()


def test_a_copy_crosses_no_end_of_what_is_registered(simgpu: SimGpu) -> None:
    runtime = torch.get_device_module("simgpu").cudart()
    host = mapped(4 * PAGE)
    target = torch.empty(2 * PAGE, dtype=torch.uint8, device=GPU)
    for page in (1, 2):
        runtime.cudaHostRegister(host.data_ptr() + page * PAGE, PAGE, 1)
    for first in (0, PAGE, 2 * PAGE):
        with pytest.raises(RuntimeError, match="invalid argument"):
            target.copy_(host[first : first + 2 * PAGE], non_blocking=True)
    target[:PAGE].copy_(host[PAGE : 2 * PAGE], non_blocking=True)
    torch.accelerator.synchronize()

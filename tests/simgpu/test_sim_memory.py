"""Memory of the simulated GPU: apart from the host's, NaN where nothing was written,
used again at once, and no more of it than there is."""

from __future__ import annotations

import ctypes
import faulthandler
import os
import signal

import pytest
import torch

from sim_device import SimGpu

pytestmark = pytest.mark.simgpu
GPU = "simgpu:0"
FLOATS = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


def test_host_code_that_reads_device_memory_dies(simgpu: SimGpu) -> None:
    tensor = torch.ones(4, device=GPU)
    child = os.fork()
    if child == 0:
        faulthandler.disable()
        ctypes.string_at(tensor.data_ptr(), 16)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status)
    assert os.WTERMSIG(status) == signal.SIGSEGV


def test_the_kernel_reads_no_file_into_device_memory(simgpu: SimGpu) -> None:
    tensor = torch.ones(4, device=GPU)
    view = (ctypes.c_char * 16).from_address(tensor.data_ptr())
    with (
        open("/dev/zero", "rb", buffering=0) as file,
        pytest.raises(OSError, match="Bad address"),
    ):
        file.readinto(view)


@pytest.mark.parametrize("other", ["cpu", "simgpu:1"])
def test_an_operation_takes_tensors_of_one_device(simgpu: SimGpu, other: str) -> None:
    with pytest.raises(RuntimeError, match="Expected all tensors to be on the same"):
        torch.ones(2, 2, device=GPU) @ torch.ones(2, 2, device=other)


def test_a_number_of_the_host_is_taken_as_it_is_now(simgpu: SimGpu) -> None:
    number = torch.tensor(2.0)
    with simgpu.held(torch.accelerator.current_stream()):
        product = torch.ones(2, device=GPU) * number
        number.fill_(7)
    assert product.tolist() == [2, 2]


@pytest.mark.parametrize("dtype", FLOATS)
def test_memory_is_nan_until_it_is_written(simgpu: SimGpu, dtype: torch.dtype) -> None:
    for _ in range(2):  # fresh, and used before
        tensor = torch.empty(300, dtype=dtype, device=GPU)
        assert tensor.isnan().all()
        tensor.zero_()
        del tensor


def test_freed_memory_is_used_again_at_once_and_nan_until_then(simgpu: SimGpu) -> None:
    tensor = torch.ones(300, device=GPU)
    address = tensor.data_ptr()
    alias = torch.empty(0, device=GPU)
    torch.accelerator.synchronize()
    del tensor
    again = torch.empty(300, device=GPU)
    assert again.data_ptr() == address
    assert again.isnan().all()
    del alias


def test_work_that_is_queued_still_has_the_memory_that_is_freed(simgpu: SimGpu) -> None:
    with simgpu.held(torch.accelerator.current_stream()):
        tensor = torch.ones(300, device=GPU)
        total = tensor.sum()
        del tensor
        torch.zeros(300, device=GPU)
    assert total.item() == 300


def test_another_stream_that_still_reads_freed_memory_reads_nan(simgpu: SimGpu) -> None:
    side = torch.Stream(GPU)
    tensor = torch.ones(300, device=GPU)
    torch.accelerator.synchronize()
    with simgpu.held(side):
        with side:
            total = tensor.sum()
        del tensor
        torch.accelerator.current_stream().synchronize()
    side.synchronize()
    assert total.isnan()


def test_recorded_memory_stays_until_the_other_stream_is_done(simgpu: SimGpu) -> None:
    side = torch.Stream(GPU)
    tensor = torch.ones(300, device=GPU)
    address = tensor.data_ptr()
    torch.accelerator.synchronize()
    with simgpu.held(side):
        with side:
            total = tensor.sum()
        tensor.record_stream(side)
        del tensor
        other = torch.zeros(300, device=GPU)
        assert other.data_ptr() != address
        torch.accelerator.current_stream().synchronize()
    side.synchronize()
    assert total.item() == 300
    assert torch.empty(300, device=GPU).data_ptr() == address


def test_blocks_belong_to_the_stream_that_allocated_them(simgpu: SimGpu) -> None:
    address = torch.empty(300, device=GPU).data_ptr()
    with torch.Stream(GPU):
        assert torch.empty(300, device=GPU).data_ptr() != address
    assert torch.empty(300, device=GPU).data_ptr() == address


def test_there_is_no_more_memory_than_its_capacity(simgpu: SimGpu) -> None:
    simgpu.set_capacity(1 << 20)
    kept = torch.empty(1 << 19, dtype=torch.uint8, device=GPU)
    with pytest.raises(torch.OutOfMemoryError, match="Tried to allocate 1048576 bytes"):
        torch.empty(1 << 20, dtype=torch.uint8, device=GPU)
    assert torch.accelerator.memory_stats(0)["num_ooms"] == 1
    del kept
    assert torch.empty(1 << 20, dtype=torch.uint8, device=GPU).numel() == 1 << 20
    assert torch.empty(1 << 21, dtype=torch.uint8, device="simgpu:1").numel() == 1 << 21


def test_statistics_count_what_is_allocated_and_reserved(simgpu: SimGpu) -> None:
    module = torch.get_device_module("simgpu")
    simgpu.set_capacity(1 << 20)
    assert module.mem_get_info(0) == (1 << 20, 1 << 20)
    kept = torch.empty(1000, dtype=torch.uint8, device=GPU)
    more = torch.empty(512, dtype=torch.uint8, device=GPU)
    assert torch.accelerator.memory_allocated(0) == 1536
    assert module.mem_get_info(0)[0] == (1 << 20) - module.memory_reserved(0)
    del more
    assert module.memory_allocated(GPU) == 1024
    assert module.max_memory_allocated(0) == 1536
    torch.accelerator.reset_peak_memory_stats(0)
    assert torch.accelerator.max_memory_allocated(0) == 1024
    assert module.memory_reserved(0) > 0
    del kept
    module.empty_cache()
    assert module.memory_reserved(0) == module.memory_allocated(0) == 0
    assert module.memory_allocated(1) == 0


def test_a_storage_is_freed_and_allocated_again(simgpu: SimGpu) -> None:
    tensor = torch.ones(1000, device=GPU)
    storage = tensor.untyped_storage()
    storage.resize_(0)
    assert torch.accelerator.memory_allocated(0) == 0
    storage.resize_(4000)
    assert tensor.isnan().all()
    tensor.fill_(2)
    storage.resize_(8000)
    assert tensor.sum().item() == 2000


def test_versions_count_what_is_written(simgpu: SimGpu) -> None:
    base = torch.zeros(8, device=GPU)
    view = base[2:4]
    before = view._version
    base[4:6].copy_(torch.ones(2), non_blocking=True)
    assert view._version == before + 1

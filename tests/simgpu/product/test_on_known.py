"""Tensors whose values the host knows answer without a wait, and never wrongly."""

from __future__ import annotations

import pytest
import torch

from on_device import GPU
from penstock.io.devices.host_copy import HostCopy
from penstock.io.devices.known import Known, knowing_constants, known_to, rows_of
from penstock.offload.generation.stopping import Ended
from sim_device import SimGpu

pytestmark = [pytest.mark.simgpu, pytest.mark.usefixtures("few_objects")]


def test_what_is_made_of_known_tensors_answers_without_a_wait(simgpu: SimGpu) -> None:
    mask = torch.tensor([[0, 1, 1], [1, 1, 1]])
    with simgpu.no_syncs(), simgpu.held(torch.accelerator.current_stream()):
        known = known_to(mask, GPU)
        longer = torch.cat([known, known.new_ones((2, 1))], dim=-1)
        assert not (longer == 1).all()
        assert longer[:, -1].tolist() == [1, 1]
        assert (rows_of(longer, [1]) == 1).all().item()
        assert int(longer.to(device=GPU, dtype=torch.bool).sum()) == 7
        with knowing_constants():
            assert (
                bool(torch.isin(torch.tensor([5], device=GPU), longer).any()) is False
            )
    assert longer.to("cpu").tolist() == [[0, 1, 1, 1], [1, 1, 1, 1]]
    assert torch.equal(longer.as_subclass(torch.Tensor).cpu(), longer.to("cpu"))


def test_what_is_made_with_others_is_unknown(simgpu: SimGpu) -> None:
    known = known_to(torch.ones(2), GPU)
    other = torch.zeros(2, device=GPU)
    assert not isinstance(known * other, Known)
    assert (known == other).tolist() == [False, False]


def test_a_known_tensor_that_is_written_to_is_unknown(simgpu: SimGpu) -> None:
    known = known_to(torch.ones(2), GPU)
    known.mul_(3)
    assert known.tolist() == [3, 3]
    known = known_to(torch.ones(2), GPU)
    known[0] = 4
    assert known.tolist() == [4, 1]


def test_the_host_says_whether_the_loop_of_transformers_stops(simgpu: SimGpu) -> None:
    unfinished = torch.ones(2, dtype=torch.long, device=GPU)
    ended = torch.tensor([True, False], device=GPU)
    with simgpu.no_syncs():
        for stops in (False, True):
            unfinished = unfinished & ~Ended.of(ended, stops=stops)
            assert bool(unfinished.max() == 0) is stops
    assert unfinished.cpu().tolist() == [0, 1]


def test_a_copy_to_the_host_is_waited_for_when_it_is_needed(simgpu: SimGpu) -> None:
    tensor = torch.ones(4, device=GPU)
    with simgpu.held(torch.accelerator.current_stream()):
        with simgpu.no_syncs():
            copy = HostCopy(tensor * 2)
        assert not copy.has_arrived
        assert copy.wait().tolist() == [2] * 4
    assert copy.has_arrived

"""A model may be loaded in any mode of torch."""

from __future__ import annotations

import pytest
import torch

import penstock
from nets import Net, batches, make, same, serially
from on_device import GPU, TIERS
from penstock import Policy
from sim_device import SimGpu

pytestmark = [pytest.mark.simgpu, pytest.mark.usefixtures("few_objects")]


def test_weights_arrive_where_the_model_was_loaded_in_inference_mode(
    simgpu: SimGpu,
) -> None:
    """The threads that copy them are not in that mode."""
    for tier, values in TIERS.items():
        net, items = make(Net), batches(2)
        expected = serially(net, items)
        with torch.inference_mode():
            policy = Policy(
                device=GPU, device_memory="40KiB", resident_below=1, **values
            )
            with penstock.wrap(net, policy), penstock.sweep(net) as sweep:
                swept = sweep.map(net, [item.to(GPU) for item in items])
            assert same([x.cpu() for x in swept], expected), tier

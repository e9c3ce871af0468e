"""Buffers go to the device that computes, and come back as they were."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

import penstock
import zoo
from nets import Net, batches, make, same, serially
from penstock import Policy
from penstock.offload.engine.moved_tensors import MovedTensors


class Tables(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("angles", torch.arange(4.0), persistent=False)
        self.register_buffer("mask", torch.ones(2, dtype=torch.bool))
        self.register_buffer("nothing", None)


def test_buffers_are_moved_and_put_back() -> None:
    first, second = Tables(), Tables()
    second._buffers["angles"] = first._buffers["angles"]
    model = nn.Sequential(first, second)
    before = {name: buffer for name, buffer in model.named_buffers()}
    meta = torch.device("meta")
    with MovedTensors(model, meta, frozenset({"1.mask"})) as moved:
        assert first.angles.device == first.mask.device == meta
        assert second.angles is first.angles, "one tensor stays one"
        assert second.mask.device.type == "cpu", "streamed: it has its own way there"
        assert first.nothing is None
    assert all(buffer is before[name] for name, buffer in model.named_buffers())
    moved.close()  # again


def test_nothing_is_moved_to_where_it_is() -> None:
    model = Tables()
    angles = model.angles
    with MovedTensors(model, torch.device("cpu"), frozenset()):
        assert model.angles is angles


def test_parameters_that_no_file_holds_are_moved_and_put_back() -> None:
    model = nn.Linear(2, 3)
    weight, bias = model.weight, model.bias
    bias.requires_grad = False
    meta = torch.device("meta")
    with MovedTensors(model, meta, frozenset({"weight"})):
        assert model.weight is weight, "streamed: it has its own way there"
        assert model.bias.device == meta
        assert isinstance(model.bias, nn.Parameter)
        assert not model.bias.requires_grad
    assert model.bias is bias


def test_torchs_default_device_decides_on_nothing(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoint"
    zoo.save_checkpoint("llama", folder)
    inputs = zoo.inputs("llama")
    with torch.inference_mode():
        expected = zoo.load("llama", folder)(**inputs).logits
    net = make(Net)
    before = serially(net, batches(2))
    with torch.device("meta"):
        model = penstock.load(folder, Policy(device_memory="1MiB"))
        penstock.unwrap(penstock.wrap(net, Policy(io={"cache": tmp_path})))
    assert {t.device.type for t in [*model.buffers(), *net.parameters()]} == {"cpu"}
    assert same(serially(net, batches(2)), before)
    with torch.inference_mode():
        assert torch.equal(model(**inputs).logits, expected)
    penstock.unwrap(model)

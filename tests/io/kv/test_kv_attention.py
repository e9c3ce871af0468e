"""Attention by the CPU for keys and values in host memory, while a GPU computes."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from test_fake_gpu import FakeGpu, gpu
from test_kv import batches_of, expected_of, swept
from torch._subclasses.fake_tensor import FakeTensorMode

import penstock
import zoo
from nets import same
from penstock import Policy
from penstock.io.errors import PolicyError
from penstock.io.kv.count import KvCount
from penstock.io.kv.in_place_buffer import InPlaceBuffer
from penstock.io.kv.shape import KvShape
from penstock.offload.kv.attention import attend
from penstock.offload.kv.layers import TieredLayer, TieredSlidingLayer

__all__ = ["gpu"]

pytestmark = pytest.mark.usefixtures("no_leaks")


def loaded(folder: Path, **kv: Any) -> Any:
    policy = Policy(
        device_memory="2MiB",
        resident_below=1,
        kv={"tier": "host", "attention": "host", **kv},
    )
    return penstock.load(folder, policy)


@pytest.mark.parametrize("name", ["llama", "mistral", "gemma3_text", "t5", "gpt2"])
def test_the_same_bits_and_nothing_comes_back(
    name: str, gpu: FakeGpu, tmp_path: Path
) -> None:
    """(Its memory is the host's, so the bits are those of one device.)"""
    items = batches_of(name, 3, tokens=20)
    expected = expected_of(name, tmp_path, items)
    with loaded(tmp_path) as model:
        assert same(swept(model, items), expected)
        found = penstock.statistics(model)
        config = model.config
    assert found.kv.num_appended > 0
    assert found.kv.bytes_moved == 0
    if any("another attention" in said for said in found.fallbacks):
        assert name == "t5", "which adds a bias of its own"
    else:
        assert not any(found.kv.bytes_read.values())
        assert config._attn_implementation == "sdpa", "as before"


def test_what_attends_otherwise_is_announced(gpu: FakeGpu, tmp_path: Path) -> None:
    items = batches_of("bloom", 2)
    expected = expected_of("bloom", tmp_path, items)
    with loaded(tmp_path) as model:
        assert same(swept(model, items), expected)
        fallbacks = penstock.statistics(model).fallbacks
    assert any("another attention than sdpa" in said for said in fallbacks)


def test_what_is_kept_as_something_else_cannot_be_attended_to(
    gpu: FakeGpu, tmp_path: Path
) -> None:
    zoo.save_checkpoint("llama", tmp_path)
    with pytest.raises(PolicyError, match=r"kv\.dtype: int8: leave one"):
        loaded(tmp_path, dtype="int8")


def test_queries_go_to_the_keys_and_results_come_back() -> None:
    """On tensors that know their device and have no bits: torch refuses to compute
    with those of two devices."""
    module: Any = torch.nn.Module()
    module.num_key_value_groups = 2
    module.is_causal = True
    with FakeTensorMode():
        query = torch.empty(3, 4, 1, 16, device="cuda")
        key, value = torch.empty(3, 2, 9, 16), torch.empty(3, 2, 9, 16)
        mask = torch.ones(3, 1, 1, 9, dtype=torch.bool, device="cuda")
        found, _ = attend(module, query, key, value, mask, scaling=0.25)
        assert found.device.type == "cuda"
        assert found.shape == (3, 1, 4, 16)
        with pytest.raises(RuntimeError):
            torch.nn.functional.scaled_dot_product_attention(query, key, value)


class Lease:
    """A lease of the host's budget."""

    tier = "host"

    def resize(self, nbytes: int) -> None:
        pass

    def give_back(self) -> None:
        pass


@pytest.mark.parametrize("window", [None, 8])
def test_a_prompt_that_comes_at_once_is_attended_to_where_it_is(
    window: int | None,
) -> None:
    """Later tokens are attended to where they are kept."""
    with FakeTensorMode():
        keys, values = (torch.empty(2, 2, 5, 16, device="cuda") for _ in range(2))
        buffer = InPlaceBuffer(
            KvShape.of(keys, values), 20, torch.device("cpu"), Lease(), KvCount()
        )
        store: Any = SimpleNamespace(open=lambda *a: buffer, touch=lambda *a: None)
        handle: Any = None
        layer = TieredLayer(store, handle, ("self", 0), 20)
        if window is not None:
            layer = TieredSlidingLayer(store, handle, ("self", 0), 20, window)
        assert layer.update(keys, values)[0] is keys
        for length in (6, 7, 8):
            new = torch.empty(2, 2, 1, 16, device="cuda")
            found, _ = layer.update(new, new)
            assert found.device.type == "cpu"
            assert found.shape[2] == length

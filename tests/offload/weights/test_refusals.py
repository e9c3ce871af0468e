"""What a streamed model refuses to do, before it has done half of it."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from test_written_weights import X, run
from torch import nn
from torch.fx.experimental.proxy_tensor import make_fx

import penstock
import zoo
from nets import Net, make
from penstock import PenstockError, Policy
from penstock.io.errors import UsageError

pytestmark = pytest.mark.usefixtures("no_leaks")


class Normed(Net):
    """With a buffer, and a part that is always in memory."""

    scale: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("scale", torch.full((1,), 0.5))
        self.norm = nn.LayerNorm(32)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(self.norm(x)) * self.scale


def streamed(tmp_path: Path, nbytes: int) -> Any:
    policy = Policy(
        device_memory=nbytes, resident_below=300, **{"io": {"cache": tmp_path}}
    )
    return penstock.wrap(make(Normed), policy)


CASTS: list[Callable[[nn.Module], Any]] = [
    lambda net: net.half(),
    lambda net: net.double(),
    lambda net: net.bfloat16(),
    lambda net: net.to(torch.float16),
    lambda net: net.to("meta"),
    lambda net: net.to_empty(device="cpu"),
]


@pytest.mark.parametrize("cast", CASTS)
@pytest.mark.parametrize("nbytes", [5 * 8192, 1 << 20])
def test_a_cast_is_refused_before_anything_is_cast(
    cast: Callable[[nn.Module], Any], nbytes: int, tmp_path: Path
) -> None:
    expected = run(make(Normed))
    with streamed(tmp_path, nbytes) as net:
        assert torch.equal(run(net), expected)
        with pytest.raises(PenstockError, match="cannot be cast"):
            cast(net)
        assert {t.dtype for t in [*net.buffers(), *net.parameters()]} == {torch.float32}
        assert torch.equal(run(net), expected)


def test_a_cast_to_what_it_is_changes_nothing(tmp_path: Path) -> None:
    with streamed(tmp_path, 1 << 20) as net:
        run(net)
        assert net.to("cpu") is net
        assert net.float() is net
        assert torch.equal(run(net), run(make(Normed)))


def test_a_state_is_not_loaded_but_says_how(tmp_path: Path) -> None:
    with (
        streamed(tmp_path, 1 << 20) as net,
        pytest.raises(UsageError, match=r"penstock\.update"),
    ):
        net.load_state_dict(make(Normed).state_dict())


def test_embeddings_are_not_resized(tmp_path: Path) -> None:
    zoo.save_checkpoint("llama", tmp_path)
    with penstock.load(tmp_path, Policy(device_memory="1MiB")) as model:
        with pytest.raises(UsageError, match="resize and save"):
            model.resize_token_embeddings(200)
        expected = zoo.load("llama", tmp_path)
        with torch.inference_mode():
            inputs = zoo.inputs("llama")
            assert torch.equal(model(**inputs).logits, expected(**inputs).logits)


@pytest.mark.filterwarnings("ignore:.*script_method:DeprecationWarning")
def test_a_streamed_model_is_not_compiled_as_a_whole(tmp_path: Path) -> None:
    with streamed(tmp_path, 1 << 20) as net:
        with pytest.raises(UsageError, match="compile: true"):
            torch.compile(net)
        with pytest.raises(UsageError, match="compile: true"):
            net.compile()
        assert not hasattr(net, "_torchdynamo_orig_callable")
        assert torch.equal(run(net), run(make(Normed)))


@pytest.mark.parametrize("copy_it", [copy.deepcopy, pickle.dumps])
def test_a_streamed_model_is_neither_copied_nor_pickled(
    copy_it: Callable[[nn.Module], Any], tmp_path: Path
) -> None:
    with streamed(tmp_path, 5 * 8192) as net:
        with pytest.raises(UsageError, match="neither copied nor pickled"):
            copy_it(net)
        assert torch.equal(run(net), run(make(Normed)))
        assert torch.equal(run(copy.copy(net)), run(make(Normed)))


def traced(net: nn.Module) -> Any:
    trace: Any = torch.jit.trace
    return trace(net, X)


def recorded(net: nn.Module) -> Any:
    return make_fx(net)(X)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("record", [traced, torch.jit.script, recorded])
@pytest.mark.parametrize("is_frozen", [False, True])
def test_a_streamed_model_is_not_recorded(
    record: Callable[[nn.Module], Any], is_frozen: bool, tmp_path: Path
) -> None:
    with streamed(tmp_path, 5 * 8192) as net, torch.no_grad():
        net.requires_grad_(not is_frozen)
        with pytest.raises(UsageError, match="traced, scripted or exported"):
            record(net)
        assert torch.equal(run(net), run(make(Normed)))


@pytest.mark.filterwarnings("ignore:.*script_method:DeprecationWarning")
def test_a_compiled_module_is_not_wrapped() -> None:
    net = make(Net)
    with pytest.raises(UsageError, match="compile: true"):
        penstock.wrap(cast(nn.Module, torch.compile(net)))
    net.compile(backend="eager")
    with pytest.raises(UsageError, match="compile: true"):
        penstock.wrap(net)


def test_unwrap_gives_strides_back(tmp_path: Path) -> None:
    net = nn.Sequential(nn.Conv2d(4, 8, 3), nn.Conv2d(8, 8, 3)).eval()
    net = net.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    x = torch.randn(1, 4, 8, 8).to(memory_format=torch.channels_last)
    strides = [parameter.stride() for parameter in net.parameters()]
    with torch.no_grad():
        expected = net(x)
        policy = Policy(device_memory="1MiB", **{"io": {"cache": tmp_path}})
        penstock.wrap(net, policy)
        assert "2 weights, such as '0.weight'" in str(
            penstock.statistics(net).fallbacks
        )
        penstock.unwrap(net)
        assert [parameter.stride() for parameter in net.parameters()] == strides
        assert torch.equal(net(x), expected)

"""A write to a streamed weight takes effect or is refused by name; no gradient comes of
weights that are gone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import penstock
from nets import Net, make
from penstock import PenstockError, Policy
from penstock.io.devices.device import CpuDevice, CpuStream
from penstock.offload.engine import build

pytestmark = pytest.mark.usefixtures("no_leaks")

X = torch.linspace(-1, 1, 64).view(2, 32)
TIGHT = {"device_memory": 3 * 8192, "resident_below": 1}
ROOMY = {"device_memory": 1 << 20, "resident_below": 1}
HOST = {"device_memory": 3 * 8192, "resident_below": 1, "host_memory": "1MiB"}


class CountingMemory:
    """One tensor, as a GPU's memory is: a copy into any of it counts for all views."""

    def __init__(self, nbytes: int) -> None:
        self.nbytes = nbytes
        self._whole = torch.zeros(nbytes, dtype=torch.uint8)

    def tensor(self, offset: int, nbytes: int) -> torch.Tensor:
        return self._whole[offset : offset + nbytes]

    def close(self) -> None:
        pass


class CountedStream(CpuStream):
    def copy(self, target: torch.Tensor, source: torch.Tensor) -> None:
        target.copy_(source)


@dataclass
class CountingDevice(CpuDevice):
    is_host = False

    @property
    def compute(self) -> CountedStream:
        return CountedStream()

    def stream(self) -> CountedStream:
        return CountedStream()

    def allocate(self, nbytes: int) -> Any:
        return CountingMemory(nbytes)


@pytest.fixture(params=["cpu", "accelerator"])
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "accelerator":
        monkeypatch.setattr(
            build, "open_device", lambda name, num_sharing=1: CountingDevice()
        )
    return str(request.param)


def streamed(tmp_path: Path, values: dict[str, Any]) -> Any:
    net = make(Net)
    return penstock.wrap(net, Policy(**values, **{"io": {"cache": tmp_path}}))


@torch.no_grad()
def run(net: nn.Module) -> torch.Tensor:
    found: torch.Tensor = net(X)
    return found


def through_data(layer: nn.Linear) -> None:
    layer.weight.data[3] = 0


def by_data(layer: nn.Linear) -> None:
    layer.weight.data = torch.zeros(32, 32)


def in_place(layer: nn.Linear) -> None:
    layer.weight.mul_(0)


def through_a_view(layer: nn.Linear) -> None:
    layer.weight.view(-1)[:5] = 0


def by_another_parameter(layer: nn.Linear) -> None:
    layer.weight = nn.Parameter(torch.zeros(32, 32))


def in_the_dictionary(layer: nn.Linear) -> None:
    layer._parameters["weight"] = nn.Parameter(torch.zeros(32, 32))


def by_swapping(layer: nn.Linear) -> None:
    other = nn.Parameter(torch.zeros(32, 32))
    swap: Any = torch.utils.swap_tensors
    swap(layer.weight, other)


def by_taking_it_away(layer: nn.Linear) -> None:
    del layer.weight


WRITES = [
    through_data,
    by_data,
    in_place,
    through_a_view,
    by_another_parameter,
    in_the_dictionary,
    by_taking_it_away,
]


@pytest.mark.parametrize("values", [TIGHT, ROOMY, HOST], ids=["tight", "roomy", "host"])
def test_what_a_loader_copies_is_no_write_of_the_model(
    device: str, values: dict[str, Any], tmp_path: Path
) -> None:
    expected = run(make(Net))
    with streamed(tmp_path, values) as net:
        for _ in range(3):
            assert torch.equal(run(net), expected)


@pytest.mark.parametrize("write", WRITES)
@pytest.mark.parametrize("values", [TIGHT, ROOMY], ids=["tight", "roomy"])
def test_a_write_inside_of_a_forward_is_refused_and_undone(
    device: str,
    values: dict[str, Any],
    write: Callable[[nn.Linear], None],
    tmp_path: Path,
) -> None:
    expected = run(make(Net))
    with streamed(tmp_path, values) as net:
        layer = net.blocks[1].linear
        hook = layer.register_forward_hook(lambda module, args, output: write(module))
        with pytest.raises(PenstockError, match=r"blocks\.1\.linear.*penstock\.update"):
            run(net)
        hook.remove()
        assert torch.equal(run(net), expected)


@pytest.mark.parametrize("write", WRITES)
@pytest.mark.parametrize("values", [TIGHT, ROOMY, HOST], ids=["tight", "roomy", "host"])
def test_a_write_outside_of_a_forward_is_refused(
    values: dict[str, Any], write: Callable[[nn.Linear], None], tmp_path: Path
) -> None:
    with streamed(tmp_path, values) as net:
        run(net)

        def write_and_run() -> None:
            with torch.no_grad():
                write(net.blocks[1].linear)
            run(net)

        with pytest.raises(PenstockError, match=r"blocks\.1\.linear.*penstock\.update"):
            write_and_run()


def test_a_weight_that_is_not_there_is_not_swapped(tmp_path: Path) -> None:
    with streamed(tmp_path, TIGHT) as net:
        with pytest.raises(PenstockError, match=r"blocks\.1\.linear.*penstock\.update"):
            by_swapping(net.blocks[1].linear)
        assert torch.equal(run(net), run(make(Net)))


@pytest.mark.parametrize("values", [TIGHT, ROOMY], ids=["tight", "roomy"])
def test_unwrap_keeps_a_parameter_that_was_put_in_place_of_a_streamed_one(
    values: dict[str, Any], tmp_path: Path
) -> None:
    net = streamed(tmp_path, values)
    theirs = nn.Parameter(torch.zeros(32, 32))
    net.blocks[1].linear.weight = theirs
    penstock.unwrap(net)
    assert net.blocks[1].linear.weight is theirs


def test_functional_call_is_refused_rather_than_ignored(tmp_path: Path) -> None:
    others = {k: torch.zeros_like(v) for k, v in make(Net).named_parameters()}
    with streamed(tmp_path, TIGHT) as net:
        with pytest.raises(PenstockError, match="replaced"):
            torch.func.functional_call(net, others, (X,))
        assert torch.equal(run(net), run(make(Net)))


def test_views_of_weights_that_are_not_there_have_their_values(tmp_path: Path) -> None:
    weight = make(Net).head.weight
    with streamed(tmp_path, TIGHT) as net:
        streamed_weight = net.head.weight
        assert torch.equal(streamed_weight.T.contiguous(), weight.T)
        assert torch.equal(torch.cat(streamed_weight.chunk(4)), weight)
        assert torch.equal(streamed_weight[2:4, 1].clone(), weight[2:4, 1])
        assert not isinstance(streamed_weight.T, nn.Parameter)


def backward(net: nn.Module) -> torch.Tensor:
    x = X.clone().requires_grad_()
    net(x).sum().backward()
    assert x.grad is not None
    return x.grad


@pytest.mark.parametrize("is_frozen", [False, True])
def test_a_backward_pass_is_refused(
    device: str, is_frozen: bool, tmp_path: Path
) -> None:
    with streamed(tmp_path, TIGHT) as net:
        if is_frozen:
            net.requires_grad_(False)
        with pytest.raises(PenstockError, match=r"gradients.*'head'.*inference"):
            backward(net)


@pytest.mark.parametrize("part", ["", "head"])
def test_a_training_step_of_a_streamed_model_is_refused(
    device: str, part: str, tmp_path: Path
) -> None:
    with streamed(tmp_path, TIGHT) as net:
        net.requires_grad_(False)
        net.get_submodule(part).requires_grad_(True)
        output = net(X)
        assert torch.equal(output, run(make(Net)))
        output[:, 0] = 0  # as one may with what any module gives
        with pytest.raises(PenstockError, match=r"gradients.*inference"):
            output.sum().backward()
        with torch.no_grad():
            assert not net(X).requires_grad
        x = torch.func.vmap(net)(X)
        assert torch.equal(x, torch.func.vmap(make(Net))(X))


def test_a_frozen_model_that_stays_in_memory_has_its_gradients(tmp_path: Path) -> None:
    with streamed(tmp_path, ROOMY) as net:
        net.requires_grad_(False)
        assert torch.equal(backward(net), backward(make(Net)))


def test_outputs_are_the_same_where_gradients_are_recorded(tmp_path: Path) -> None:
    with streamed(tmp_path, TIGHT) as net:
        x = X.clone().requires_grad_()
        assert torch.equal(net(x), run(make(Net)))


def test_a_head_that_is_trained_on_detached_states_has_gradients(
    tmp_path: Path,
) -> None:
    head = nn.Linear(32, 1)
    with streamed(tmp_path, TIGHT) as net:
        head(net(X).detach()).sum().backward()
    assert head.weight.grad is not None


class Casting(nn.Module):
    """Computes in another dtype than its weights have, as some routers do."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(32, 32, dtype=torch.bfloat16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.linear.to(torch.float32)(x)
        return found


@pytest.mark.parametrize("policy", [TIGHT, ROOMY, HOST])
def test_a_module_that_casts_its_own_weights_does_so_at_every_pass(
    policy: dict[str, Any], tmp_path: Path
) -> None:
    def made() -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return nn.Sequential(*(Casting() for _ in range(5)))

    whole, net = made(), made()
    with torch.inference_mode():
        expected = whole(X)
        penstock.wrap(net, Policy(io={"cache": tmp_path}, **policy))
        for _ in range(3):
            assert torch.equal(net(X), expected)
        penstock.unwrap(net)
        assert torch.equal(net(X), expected)

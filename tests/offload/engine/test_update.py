"""`penstock.update` gives other values to the weights of a model that is streamed."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import pytest
import torch
from test_written_weights import X, device, run
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

import penstock
import zoo
from nets import Net, make
from penstock import PenstockError, Policy
from penstock.io.errors import OutputError, UsageError
from penstock.offload.engine import updates
from penstock.offload.model import engine_of

__all__ = ["device"]

pytestmark = pytest.mark.usefixtures("no_leaks")

TIGHT: dict[str, Any] = {"device_memory": 3 * 8192, "resident_below": 1}
TIERS: dict[str, dict[str, Any]] = {
    "slots": TIGHT,
    "all stays": TIGHT | {"device_memory": 1 << 20},
    "host": TIGHT | {"host_memory": "1MiB"},
    "peer": TIGHT | {"peer": {"cpu": "1MiB"}},
    "resident": {"device_memory": 1 << 20, "resident_below": "1MiB"},
}


def streamed(net: nn.Module, values: dict[str, Any], folder: Path) -> Any:
    return penstock.wrap(net, Policy(**values, **{"io": {"cache": folder}}))


def changed(net: nn.Module, *names: str) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    found = dict(net.named_parameters())
    return {n: torch.randn(found[n].shape, generator=generator) for n in names}


def resident(values: dict[str, torch.Tensor]) -> torch.Tensor:
    net = make(Net)
    net.load_state_dict(values, strict=False)
    return run(net)


NAMES = ("blocks.1.linear.weight", "head.bias", "embed.weight", "blocks.3.linear.bias")


@pytest.mark.parametrize("tier", TIERS)
def test_the_next_forward_has_the_new_values(
    device: str, tier: str, tmp_path: Path
) -> None:
    with streamed(make(Net), TIERS[tier], tmp_path) as net:
        run(net)
        before = penstock.statistics(net).device_memory_bytes
        for names in (
            NAMES,
            NAMES[:1],
            NAMES[::-1],
            (NAMES[0], "blocks.4.linear.weight"),
        ):
            values = changed(make(Net), *names)
            penstock.update(net, values)
            if names == NAMES:
                first = values
        expected = resident({**first, **changed(make(Net), *NAMES[::-1]), **values})
        for _ in range(2):
            assert torch.equal(run(net), expected)
        assert penstock.statistics(net).device_memory_bytes == before
        assert penstock.statistics(net).faults == {}


def test_the_folder_holds_each_changed_weight_once(tmp_path: Path) -> None:
    with streamed(make(Net), TIGHT, tmp_path) as net:
        for _ in range(5):
            penstock.update(net, changed(net, "head.weight", "head.bias"))
        assert len(list(tmp_path.glob("updated-*/*.safetensors"))) == 1
    assert list(tmp_path.glob("updated-*")) == []


def test_unwrap_gives_the_new_values_back(tmp_path: Path) -> None:
    net = streamed(make(Net), TIGHT, tmp_path)
    values = changed(net, *NAMES)
    penstock.update(net, values)
    penstock.unwrap(net)
    assert torch.equal(run(net), resident(values))


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(64, 32)
        self.blocks = nn.ModuleList(nn.Linear(32, 32) for _ in range(4))
        self.head = nn.Linear(32, 64, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embed(ids)
        for block in self.blocks:
            x = torch.tanh(block(x))
        found: torch.Tensor = self.head(x)
        return found


@pytest.mark.parametrize("name", ["embed.weight", "head.weight"])
@pytest.mark.parametrize("gather", [1, "1GiB"])
def test_a_tied_weight_is_changed_by_either_name_and_its_rows_are_looked_up(
    name: str, gather: Any, tmp_path: Path
) -> None:
    ids = torch.arange(6)[None] * 9
    value = torch.linspace(-1, 1, 64 * 32).view(64, 32)
    net = make(Tied)
    with torch.no_grad():
        net.embed.weight.copy_(value)
        expected = net(ids)
    policy = {"device_memory": 40_960, "resident_below": 1, "gather_rows": gather}
    with streamed(make(Tied), policy, tmp_path) as model, torch.no_grad():
        penstock.update(model, {name: value})
        assert torch.equal(model(ids), expected)
        with pytest.raises(UsageError, match="one tied weight"):
            penstock.update(model, {"embed.weight": value, "head.weight": -value})


@pytest.mark.parametrize("kind", ["llama", "mixtral"])
def test_weights_have_the_names_that_transformers_has(
    kind: str, tmp_path: Path
) -> None:
    zoo.save_checkpoint(kind, tmp_path / "model")
    whole = zoo.load(kind, tmp_path / "model")
    names = [n for n, _ in whole.named_parameters() if "layers.1." in n]
    values = {n: torch.full_like(whole.get_parameter(n), 0.01) for n in names}
    whole.load_state_dict(values, strict=False)
    policy = Policy(
        device_memory=400_000, resident_below=1, **{"io": {"cache": tmp_path}}
    )
    with penstock.load(tmp_path / "model", policy) as model, torch.inference_mode():
        model(**zoo.inputs(kind))
        penstock.update(model, values)
        inputs = zoo.inputs(kind)
        assert torch.equal(model(**inputs).logits, whole(**inputs).logits)


def test_what_does_not_fit_is_refused_and_changes_nothing(tmp_path: Path) -> None:
    expected = run(make(Net))
    good = {"head.weight": torch.zeros(32, 32)}
    bad: list[tuple[dict[str, Any], str]] = [
        ({"blocks.1.linear.wieght": torch.zeros(1)}, r"'blocks\.1\.linear\.weight'"),
        ({"head.bias": torch.zeros(31)}, r"\[32\].*\[31\]"),
        ({"head.bias": torch.zeros(32, dtype=torch.int64)}, "int64"),
        ({"head.bias": torch.zeros(32, device="meta")}, "meta"),
        ({"head.bias": [0.0] * 32}, "list"),
        ({"head.bias": torch.zeros(32).to_sparse()}, r"sparse.*to_dense"),
        ({"head.bias": FakeTensorMode().from_tensor(torch.zeros(32))}, "FakeTensor"),
        ({cast(str, 3): torch.zeros(32)}, "no weight '3'"),
    ]
    with streamed(make(Net), TIGHT, tmp_path) as net:
        for values, said in bad:
            with pytest.raises(UsageError, match=said):
                penstock.update(net, {**good, **values})
        for nothing in (None, "head.bias", list(good.items()), net.named_parameters()):
            with pytest.raises(UsageError, match="dict of tensors by name"):
                penstock.update(net, cast(Any, nothing))
        assert torch.equal(run(net), expected)


def test_a_cast_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    value = torch.linspace(0, 1, 32, dtype=torch.float64)
    with streamed(make(Net), TIGHT, tmp_path) as net:
        penstock.update(net, {"head.bias": value})
        assert torch.equal(run(net), resident({"head.bias": value}))
        (said,) = (f for f in penstock.statistics(net).fallbacks if "update of" in f)
    assert said in caplog.text
    assert "float64 is cast to torch.float32" in caplog.text


def test_no_weight_is_changed_during_a_sweep_or_a_forward(tmp_path: Path) -> None:
    expected = run(make(Net))

    def meddle(net: Any) -> None:
        penstock.update(net, {"head.bias": torch.zeros(32)})

    with streamed(make(Net), TIGHT, tmp_path) as net:
        hook = net.blocks[1].register_forward_hook(lambda *args: meddle(net))
        with pytest.raises(PenstockError, match="under way"):
            run(net)
        hook.remove()

        def meddling(x: torch.Tensor) -> None:
            net(x)
            meddle(net)

        with (
            penstock.sweep(net) as sweep,
            pytest.raises(PenstockError, match="under way"),
        ):
            sweep.map(meddling, [X, X])
        assert torch.equal(run(net), expected)


def test_all_is_as_it_was_when_the_folder_cannot_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = run(make(Net))

    def full(*args: Any) -> None:
        raise OSError("no space left on device")

    with streamed(make(Net), TIGHT, tmp_path) as net:
        monkeypatch.setattr(updates, "save_file", full)
        with pytest.raises(OutputError, match=r"no space.*io\.cache"):
            penstock.update(net, changed(net, *NAMES))
        assert torch.equal(run(net), expected)


@pytest.mark.parametrize("tier", ["slots", "host", "resident"])
def test_all_is_as_it_was_when_a_unit_cannot_be_loaded_again(
    tier: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = run(make(Net))
    with streamed(make(Net), TIERS[tier], tmp_path) as net:
        run(net)
        calls = iter([True])
        put = updates.Updates._put

        def failing(self: Any, *args: Any) -> None:
            put(self, *args)
            if next(calls, False):
                raise OSError("the disk is gone")

        monkeypatch.setattr(updates.Updates, "_put", failing)
        with pytest.raises(OSError, match="gone"):
            penstock.update(net, changed(net, *NAMES))
        assert torch.equal(run(net), expected)


def test_a_weight_that_was_replaced_or_written_is_sound_after_an_update(
    tmp_path: Path,
) -> None:
    with streamed(make(Net), TIERS["host"], tmp_path) as net:
        run(net)
        net.head.weight.data.zero_()
        net.embed.weight = nn.Parameter(torch.zeros(32, 32))
        values = changed(make(Net), "head.weight", "embed.weight")
        penstock.update(net, values)
        assert torch.equal(run(net), resident(values))


def test_shared_host_memory_is_not_changed(tmp_path: Path) -> None:
    policy = TIGHT | {"host_memory": "1MiB", "host_shared": True}
    with streamed(make(Net), policy, tmp_path) as net:
        shared = engine_of(net)._tiers.placement
        assert "host" in shared
        with pytest.raises(UsageError, match="host_shared: false"):
            penstock.update(net, changed(net, *NAMES))

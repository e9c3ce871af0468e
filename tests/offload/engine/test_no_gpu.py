"""Without a GPU, asking for one is a mistake that is explained in one sentence."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from test_score import run

import penstock
import zoo
from nets import Net, batches, make, same, serially
from penstock import Policy
from penstock.io.errors import PolicyError

pytestmark = pytest.mark.usefixtures("no_leaks")


@pytest.fixture(autouse=True)
def _no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


@pytest.mark.parametrize(
    ("values", "name"),
    [
        ({"device": "cuda"}, "cuda"),
        ({"device": "cuda:1"}, "cuda:1"),
        ({"peer": {"cuda:1": "1MiB"}, "placement": {"blocks": "peer"}}, "cuda:1"),
        ({"peer": {"cuda": "1MiB"}, "placement": {"blocks": "cuda"}}, "cuda"),
    ],
)
def test_a_gpu_that_is_not_there_is_a_mistake_in_the_policy(
    values: dict[str, Any], name: str
) -> None:
    net = make(Net)
    expected = serially(net, batches(2))
    policy = Policy(device_memory="1MiB", resident_below=1, **values)
    with pytest.raises(PolicyError, match=rf"^'{name}': this torch .* write cpu in"):
        penstock.wrap(net, policy)
    assert same(serially(net, batches(2)), expected)  # the module is what it was


def test_a_peer_that_is_not_there_matters_only_where_something_is_to_stay() -> None:
    net = make(Net)
    values = {"peer": {"cuda:1": "1MiB"}, "placement": {"": "disk"}}
    penstock.wrap(net, Policy(device_memory="1MiB", resident_below=1, **values))
    assert penstock.statistics(net).bytes_by_tier["peer"] == 0
    penstock.unwrap(net)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["device=cuda"], "'cuda': this torch"),
        (["peer.cuda:1=1GiB", 'placement={"": peer}'], "'cuda:1': this torch"),
        (["device=gpu"], "device: 'gpu' is not a device: write cpu, cuda or cuda:1"),
        (
            ["placement={a: gpu}"],
            "placement.a: 'gpu' is not a tier: write device, peer",
        ),
        (["placement={a"], "--set placement={a:1:3: not valid YAML"),
        (["links.host.bandwith=1"], "unknown key 'links.host.bandwith' (did you"),
        (['placement={"": host}'], "which has room for 0: set host_memory, or name"),
    ],
)
def test_the_command_line_says_so_in_one_sentence_and_ends_with_2(
    settings: list[str], message: str, tmp_path: Path
) -> None:
    zoo.save_checkpoint("llama", tmp_path)
    words = [word for setting in settings for word in ("--set", setting)]
    found = run("verify", tmp_path, *words)
    assert found.returncode == 2
    assert message in found.stderr
    assert found.stderr.startswith("penstock: error: ")
    assert found.stderr.count("\n") == 1
    assert found.stdout == ""

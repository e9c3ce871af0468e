"""Weights on all four tiers at once: outputs are the resident model's, bit for bit, and
every tier gives as many bytes as it should.

On the CPU: another "device" is host memory, and the host tier is reached by a link.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from test_architectures import NAMES, outputs_of

import penstock
import zoo
from nets import Net, batches, make, same, serially
from penstock import Policy
from penstock.io.errors import DoesNotFitError
from penstock.io.weights.link import Link
from penstock.io.weights.load import Load
from penstock.io.weights.source import StagedSource
from penstock.offload.engine.engine import Engine
from penstock.offload.engine.tiers import Tiers
from penstock.offload.model import engine_of
from shares import shared

pytestmark = pytest.mark.usefixtures("no_leaks")

TIERS = ("device", "peer", "host", "disk")
GREEDY = {"max_new_tokens": 2, "do_sample": False}
# As fast as they are, but links all the same.
LINKS = {tier: {"bandwidth": "1000TB"} for tier in ("peer", "host", "disk")}
MIXED: dict[str, Any] = {
    "peer": {"cpu": "1GiB"},
    "host_memory": "1GiB",
    "gather_rows": 1000,
    "resident_below": 256,
    "lookahead": 1,
}


def sizes_of(engine: Engine) -> dict[int, int]:
    """Bytes in a slot of each unit that is streamed."""
    return {
        index: engine._tiers._layouts[index].nbytes
        for index, unit in enumerate(engine.model_division.units)
        if unit.sites and not unit.is_resident
    }


def room_to_stay(engine: Engine, lookahead: int) -> int:
    resident, by_site = engine.arrangement.division.needs()
    capacity = engine.statistics().device_memory_bytes
    return capacity - resident - (1 + lookahead) * max(by_site)


def rules_for(engine: Engine, lookahead: int) -> dict[str, str] | None:
    """The smallest unit stays on the device, if it fits; the others stand elsewhere, in
    turns."""
    sizes = sizes_of(engine)
    names = {unit: engine.model_division.units[unit].name for unit in sizes}
    assert len(set(names.values())) == len(names), "a name stands for two units"
    smallest = min(sizes, key=lambda unit: sizes[unit])
    if sizes[smallest] > room_to_stay(engine, lookahead):
        return None
    rest = [unit for unit in sizes if unit != smallest]
    found = {smallest: "device"}
    found |= {unit: TIERS[1 + turn % 3] for turn, unit in enumerate(rest)}
    return {f"^{re.escape(names[unit])}$": tier for unit, tier in found.items()}


def mixed_policy(name: str, folder: Path) -> Policy:
    """A policy with the smallest of a few budgets in which one unit can stay."""
    total = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    for quarters in (2, 3, 4, 6, 8, 12):
        values = {**MIXED, "device_memory": total * quarters // 4}
        try:
            with penstock.load(folder, Policy(links=LINKS, **values)) as probe:
                rules = rules_for(engine_of(probe), MIXED["lookahead"])
        except DoesNotFitError:
            continue
        if rules is not None:
            return Policy(placement=rules, links=LINKS, **values)
    raise AssertionError(f"nothing of {name} can stay")


@pytest.fixture
def loads(monkeypatch: pytest.MonkeyPatch) -> Counter[int]:
    """How often each unit was brought into a slot."""
    found: Counter[int] = Counter()
    load: Callable[..., Load] = Tiers.load

    def counted(self: Tiers, unit: int, offset: int, after: Any) -> Load:
        found[unit] += 1
        return load(self, unit, offset, after)

    monkeypatch.setattr(Tiers, "load", counted)
    return found


def moved(engine: Engine, loads: Counter[int]) -> dict[str, int]:
    """Bytes that these loads bring over the links of peers and host."""
    found = dict.fromkeys(("peer", "host"), 0)
    for unit, count in loads.items():
        tier = engine._tiers.placement[unit]
        tier = "peer" if tier == "cpu" else tier
        if tier in found:
            found[tier] += count * engine._tiers._layouts[unit].nbytes
    return found


def read_by(engine: Engine, loads: Counter[int]) -> int:
    """Bytes of the windows that these loads, and filling the tiers, read from disk."""
    layouts, placement = engine._tiers._layouts, engine._tiers.placement
    files = {read.extent.path for plan in layouts for read in plan.reads}
    ends = {path: path.stat().st_size for path in files}
    return sum(
        (loads[unit] if placement[unit] in ("device", "disk") else 1)
        * sum(
            min(read.extent.end, ends[read.extent.path]) - read.extent.offset
            for read in plan.reads
        )
        for unit, plan in enumerate(layouts)
    )


@pytest.mark.parametrize("name", shared(NAMES, lambda n, name: n % 4 == 1))
def test_on_all_tiers_at_once_outputs_are_the_resident_models(
    name: str, tmp_path: Path, loads: Counter[int]
) -> None:
    zoo.save_checkpoint(name, tmp_path)
    resident = zoo.load(name, tmp_path)
    batch = zoo.inputs(name)
    generates = zoo.ARCHITECTURES[name].generates
    policy = mixed_policy(name, tmp_path)
    loads.clear()
    with penstock.load(tmp_path, policy) as model:
        engine = engine_of(model)
        with torch.inference_mode():
            for _ in range(1 if generates else 2):
                assert torch.equal(
                    outputs_of(model, batch), outputs_of(resident, batch)
                )
            if generates:
                tokens = resident.generate(**batch, **GREEDY)
                assert torch.equal(model.generate(**batch, **GREEDY), tokens)
    statistics = engine.statistics()  # closed: nothing is under way any more
    assert {engine._tiers.placement[unit] for unit in loads} >= {
        "device",
        "cpu",
        "host",
        "disk",
    }
    held = statistics.bytes_by_tier
    # What is used outside of its unit's forward is moved to the device.
    assert statistics.faults or all(held[tier] > 0 for tier in TIERS), held
    read = dict(statistics.bytes_read)
    assert read.pop("disk") >= read_by(engine, loads)
    assert read == moved(engine, loads)
    assert all(read.values())
    assert statistics.peak_device_bytes <= statistics.device_memory_bytes


@pytest.mark.parametrize("reader", ["threads", "libaio", "aiofiles"])
def test_each_pass_moves_exactly_what_does_not_stay(
    reader: str, tmp_path: Path, loads: Counter[int]
) -> None:
    """The head and the first layer stay, which leaves room for one layer: each pass
    brings the embedding from disk, one layer from the peer, one from the host."""
    zoo.save_checkpoint("llama", tmp_path)
    resident = zoo.load("llama", tmp_path)
    batch = zoo.inputs("llama")
    with torch.inference_mode():
        expected = resident(**batch).logits
        tokens = resident.generate(**batch, max_new_tokens=5, do_sample=False)
    values = {**MIXED, "gather_rows": "1GiB", "lookahead": 0, "io": {"reader": reader}}
    with penstock.load(tmp_path, Policy(device_memory="1MiB", **values)) as probe:
        engine = engine_of(probe)
        sizes = {
            engine.model_division.units[u].name: n for u, n in sizes_of(engine).items()
        }
        resident_bytes = sum(
            plan.nbytes
            for unit, plan in zip(
                engine.model_division.units, engine._tiers._layouts, strict=True
            )
            if unit.is_resident
        )
    layer = "model.layers."
    assert list(sizes) == [
        "model.embed_tokens",
        *(f"{layer}{i}" for i in range(3)),
        ("lm_head"),
    ]
    layers = [sizes[f"{layer}{i}"] for i in range(3)]
    assert max(layers) - min(layers) < sizes["lm_head"] <= sizes["model.embed_tokens"]
    rules = {
        f"{layer}0|lm_head": "device",
        f"{layer}1": "peer",
        f"{layer}2": "host",
        "embed": "disk",
    }
    capacity = resident_bytes + layers[0] + max(layers) + sizes["lm_head"]
    loads.clear()
    policy = Policy(device_memory=capacity, placement=rules, links=LINKS, **values)
    with penstock.load(tmp_path, policy) as model:
        engine = engine_of(model)

        def read() -> dict[str, int]:
            return dict(penstock.statistics(model).bytes_read)

        filled = read()
        assert (filled["peer"], filled["host"]) == (0, 0)
        with torch.inference_mode():
            assert torch.equal(model(**batch).logits, expected)
        before = read()
        with torch.inference_mode():
            for _ in range(3):
                assert torch.equal(model(**batch).logits, expected)
        three = {tier: read()[tier] - before[tier] for tier in before}
        before = read()
        assert torch.equal(
            model.generate(**batch, max_new_tokens=5, do_sample=False), tokens
        )
        five = {tier: read()[tier] - before[tier] for tier in before}
        one = {
            "disk": sizes["model.embed_tokens"],
            "peer": sizes[f"{layer}1"],
            "host": sizes[f"{layer}2"],
        }
        assert three == {tier: 3 * nbytes for tier, nbytes in one.items()}
        assert five == {tier: 5 * nbytes for tier, nbytes in one.items()}
    statistics = engine.statistics()
    assert dict(statistics.bytes_by_tier) == {
        "device": sum(engine.recipes[n].nbytes for n in tensors_on(engine, "device")),
        "peer": sum(engine.recipes[n].nbytes for n in tensors_on(engine, "cpu")),
        "host": sum(engine.recipes[n].nbytes for n in tensors_on(engine, "host")),
        "disk": engine.recipes["model.embed_tokens.weight"].nbytes,
    }
    assert statistics.bytes_read["disk"] == read_by(engine, loads)
    assert statistics.peak_device_bytes <= capacity
    assert statistics.faults == {}


def tensors_on(engine: Engine, tier: str) -> list[str]:
    """Names of the tensors there; what is always needed is on the device."""
    return [
        name
        for index, unit in enumerate(engine.model_division.units)
        if (engine._tiers.placement[index] == tier and not unit.is_resident)
        or (unit.is_resident and tier == "device")
        for name in unit.tensors
    ]


@pytest.mark.parametrize("asked", [1, "64KiB", "auto"])
def test_staging_holds_the_largest_unit_whatever_was_asked(asked: int | str) -> None:
    net = make(Net)
    expected = serially(net, batches(3))
    policy = Policy(
        device_memory="64KiB", resident_below=1, links=LINKS, staging_memory=asked
    )
    penstock.wrap(net, policy)
    try:
        engine = engine_of(net)
        (link,) = engine._tiers.links
        assert isinstance(link, Link)
        assert isinstance(link._source, StagedSource)
        largest = max(plan.nbytes for plan in engine._tiers._layouts)
        wanted = {1: largest, "64KiB": 64 << 10, "auto": 3 * largest}
        assert link._source._memory.nbytes == wanted[asked]
        assert same(serially(net, batches(3)), expected)
    finally:
        penstock.unwrap(net)

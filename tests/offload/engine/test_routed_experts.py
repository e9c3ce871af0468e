"""Experts that are loaded one by one compute what the whole layer does."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from moe_models import (
    GREEDY,
    batches,
    checkpoint,
    expert_bytes,
    layer_bytes,
    resident,
)
from torch import nn
from torch.nn.utils import parametrize
from transformers import AutoModelForCausalLM

import penstock
from penstock import Policy
from penstock.io.errors import DoesNotFitError, ReadError
from penstock.io.handle import Handle
from penstock.io.weights.host import HostTier
from penstock.io.weights.loader import UnitLoad
from penstock.offload.experts.expert_pairs import ExpertCall, ExpertPairs
from penstock.offload.model import engine_of
from shares import shared

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("no_leaks")]

F32, BF16 = torch.float32, torch.bfloat16
SMALL = {"resident_below": 1, "gather_rows": 1000}
LINK = {"host": {"bandwidth": "4GiB"}}
TIERS: dict[str, dict[str, Any]] = {
    "disk": {},
    "host": {"host_memory": "16MiB", "links": LINK},
    "in place": {"host_memory": "400KiB"},
    "mixed": {"host_memory": "400KiB", "links": LINK},
}
CASES = [
    (name, dtype, way, tier)
    for name in ("qwen3_moe", "deepseek_v3")
    for dtype in (F32, BF16)
    for way in ("grouped_mm", "eager", "batched_mm")
    for tier in TIERS
]


def streamed(folder: Path, num_bytes: int, **values: Any) -> Any:
    return penstock.load(folder, Policy(device_memory=num_bytes, **SMALL, **values))


def least_of(folder: Path, **values: Any) -> int:
    """The least working set, as the refusal says."""
    with pytest.raises(DoesNotFitError) as refused:
        streamed(folder, 4096, **values)
    return int(str(refused.value).split()[-1])


def generated(model: Any, num: int, *, size: int = 2, **options: Any) -> torch.Tensor:
    with penstock.sweep(model, **options) as sweep:
        made = sweep.map(lambda b: model.generate(**b, **GREEDY), batches(num, size))
    return torch.cat(made)


def expected(model: Any, num: int, *, size: int = 2) -> torch.Tensor:
    return torch.cat([model.generate(**b, **GREEDY) for b in batches(num, size)])


@pytest.mark.parametrize(
    ("name", "dtype", "way", "tier"), shared(CASES, lambda place, _: place % 9 == 0)
)
def test_pieces_give_the_bits_of_the_whole(
    tmp_path: Path, name: str, dtype: torch.dtype, way: str, tier: str
) -> None:
    """In budgets for a layer and for a few experts; plain, in a sweep, generating."""
    whole = resident(name, dtype)
    whole.set_experts_implementation(way)
    folder = checkpoint(tmp_path, name, dtype)
    for num_bytes in (layer_bytes(whole), 6 * expert_bytes(whole) + (64 << 10)):
        with streamed(folder, num_bytes, **TIERS[tier]) as model:
            assert engine_of(model).model_division.stacks
            model.set_experts_implementation(way)
            with torch.inference_mode():
                for batch in batches(2):
                    assert torch.equal(model(**batch).logits, whole(**batch).logits)
                with penstock.sweep(model, coalesce=False) as sweep:
                    made = sweep.map(lambda b: model(**b).logits, batches(3))
                for logits, batch in zip(made, batches(3), strict=True):
                    assert torch.equal(logits, whole(**batch).logits)
            assert torch.equal(generated(model, 3), expected(whole, 3))
            assert not penstock.statistics(model).faults


def test_rows_of_an_expert_are_in_the_order_of_transformers() -> None:
    """Its sort is not stable, and a row's place among others can change its bits."""
    choices = torch.randint(0, 4, (300, 2), generator=torch.Generator().manual_seed(0))
    states, weights = torch.zeros(300, 8), torch.ones(300, 2)
    pairs = ExpertPairs.of(ExpertCall(states, choices, weights, "sum"), 4)
    assert torch.equal(pairs.places, torch.sort(choices.reshape(-1))[1])


@pytest.mark.parametrize("name", ["qwen3_moe", "deepseek_v3"])
def test_attention_and_two_experts_are_enough(tmp_path: Path, name: str) -> None:
    whole, folder = resident(name, F32), checkpoint(tmp_path, name)
    attention = sum(p.nbytes for p in whole.model.layers[-1].self_attn.parameters())
    enough = attention + 2 * expert_bytes(whole)
    least = least_of(folder)
    assert least <= enough < layer_bytes(whole)
    with streamed(folder, least) as model:
        assert torch.equal(generated(model, 2), expected(whole, 2))


@pytest.mark.parametrize("num", [1, 4])
@pytest.mark.parametrize("coalesce", [False, True])
def test_only_chosen_experts_are_loaded(
    tmp_path: Path, num: int, coalesce: bool
) -> None:
    """Whether they are chosen by one sequence, or by some in several micro-batches."""
    whole, folder = resident("qwen3_moe", F32), checkpoint(tmp_path, "qwen3_moe")
    chosen: list[tuple[str, set[int]]] = []
    with streamed(folder, layer_bytes(whole)) as model:
        for name, module in model.named_modules():
            if name.endswith("experts"):
                module.register_forward_pre_hook(
                    lambda _, args, name=name: chosen.append(
                        (name, set(args[1].flatten().tolist()))
                    )
                )
        made = generated(model, num, size=1, coalesce=coalesce)
        found = penstock.statistics(model)
    assert torch.equal(made, expected(whole, num, size=1))
    num_layers, each = 3, expert_bytes(whole)
    passes = [chosen[i : i + num_layers * num] for i in range(0, len(chosen), 3 * num)]
    touched = 0
    for calls in passes:
        by_layer: dict[str, set[int]] = {}
        for name, experts in calls:
            by_layer.setdefault(name, set()).update(experts)
        touched += each * sum(map(len, by_layer.values()))
    assert found.expert_bytes_touched == touched
    assert found.expert_bytes_loaded <= 1.1 * touched
    assert found.expert_bytes_loaded < num_layers * len(passes) * 16 * each


@pytest.mark.parametrize("tier", ["disk", "host"])
def test_experts_that_are_used_most_stay(tmp_path: Path, tier: str) -> None:
    """The same prompt again finds its experts there, wherever they come from; after a
    while another one does, too."""
    whole, folder = resident("qwen3_moe", F32), checkpoint(tmp_path, "qwen3_moe")
    num_bytes = 3 * layer_bytes(whole) // 2
    whole.set_experts_implementation("grouped_mm")
    with streamed(folder, num_bytes, lookahead=0, **TIERS[tier]) as model:
        division = engine_of(model).model_division
        placement = engine_of(model).arrangement.placement
        stay = [
            u for u, t in zip(division.units, placement, strict=True) if t == "device"
        ]
        assert any(unit.experts for unit in stay), "as plans count them"
        for batch in batches(2, 1, 2):
            for _ in range(8):
                with torch.inference_mode():
                    assert torch.equal(model(**batch).logits, whole(**batch).logits)
            before = penstock.statistics(model)
            with torch.inference_mode():
                model(**batch)
            after = penstock.statistics(model)
            assert after.expert_bytes_touched > before.expert_bytes_touched
            assert after.expert_bytes_loaded == before.expert_bytes_loaded
            assert after.expert_hit_rate > before.expert_hit_rate


@pytest.mark.parametrize(
    ("values", "num"),
    [
        ({}, 16),
        ({"host_memory": "2200KiB"}, 9),
        ({"placement": {r"layers\.0\..*experts": "device", "experts": "host"}}, 0),
    ],
)
def test_experts_come_from_host_memory_as_far_as_it_has_room(
    tmp_path: Path, values: dict[str, Any], num: int
) -> None:
    """Those that the plan counts for the device, unless a rule puts them there."""
    whole, folder = resident("qwen3_moe", F32), checkpoint(tmp_path, "qwen3_moe")
    sizes = {"device_memory": 3 * layer_bytes(whole) // 2, "lookahead": 0}
    policy = Policy(**{**SMALL, **TIERS["host"], **sizes, **values})
    with penstock.load(folder, policy) as model:
        engine = engine_of(model)
        placed, loaded = engine.arrangement.placement, engine._tiers.placement
        units = engine.model_division.units
        assert penstock.statistics(model).bytes_by_tier["device"]
        assert engine.arrangement.division.found.stacks
        moved = [u for u, a, b in zip(units, placed, loaded, strict=True) if a != b]
        assert all(unit.experts for unit in moved)
        assert len(moved) == num
        tiers = engine._tiers
        assert tiers.host is not None
        assert tiers.host.memory.nbytes <= (policy.host_memory or 0)


FEW = {"device_memory": 432 << 10, "lookahead": 0, "host_memory": "800KiB"}
"""Room for a few experts on the device, and for a third of them in host memory."""


def disk_bytes(model: Any, batch: dict[str, torch.Tensor], wanted: Any) -> int:
    """Bytes that a forward reads from disk; it has the right bits."""
    before = penstock.statistics(model).bytes_read["disk"]
    with torch.inference_mode():
        assert torch.equal(model(**batch).logits, wanted)
    return penstock.statistics(model).bytes_read["disk"] - before


def test_experts_that_are_used_most_come_to_host_memory(tmp_path: Path) -> None:
    """One after the other, while the model runs: less and less is read from disk."""
    whole, folder = resident("qwen3_moe", F32), checkpoint(tmp_path, "qwen3_moe")
    whole.set_experts_implementation("grouped_mm")
    with penstock.load(folder, Policy(**{**SMALL, "links": LINK, **FEW})) as model:
        held = penstock.statistics(model).bytes_by_tier
        for batch in batches(2, 1, 2):
            with torch.inference_mode():
                wanted = whole(**batch).logits
            disk_bytes(model, batch, wanted)
            first = disk_bytes(model, batch, wanted)
            for _ in range(60):
                last = disk_bytes(model, batch, wanted)
            assert last < first // 2
        found = penstock.statistics(model)
        assert found.host_experts_exchanged > 8
        assert found.bytes_by_tier == held
        host = engine_of(model)._tiers.host
        assert host is not None
        assert host.memory.nbytes <= 800 << 10
        placement = engine_of(model)._tiers.placement
        there = [unit for unit, tier in enumerate(placement) if tier == "host"]
        assert {*there} <= host.offsets.keys()
        assert len({*host.offsets.values()}) == len(host.offsets)


def test_an_update_finds_each_expert_in_one_place(tmp_path: Path) -> None:
    """Whatever step an exchange is at."""
    whole, folder = resident("qwen3_moe", F32), checkpoint(tmp_path, "qwen3_moe")
    whole = copy.deepcopy(whole)
    whole.set_experts_implementation("grouped_mm")
    (batch,) = batches(1, 1, 2)
    name = "model.layers.1.mlp.experts.down_proj"
    with penstock.load(folder, Policy(**{**SMALL, "links": LINK, **FEW})) as model:
        for _ in range(24):
            new = whole.get_parameter(name).detach().flip(0).clone()
            penstock.update(model, {name: new})
            with torch.inference_mode():
                whole.get_parameter(name).copy_(new)
                wanted = whole(**batch).logits
            disk_bytes(model, batch, wanted)
        assert penstock.statistics(model).host_experts_exchanged


class Unreadable:
    """A loader none of whose loads succeeds: every other one does not even begin."""

    def __init__(self) -> None:
        self.num_loads = 0
        self.is_closed = False

    def load(self, unit: int, offset: int) -> UnitLoad:
        self.num_loads += 1
        if self.num_loads % 2:
            raise ReadError("no")
        failed = Handle(1)
        failed.done(ReadError("no"))
        return UnitLoad("a unit", [failed])

    def close(self) -> None:
        self.is_closed = True


def test_a_failed_exchange_is_nobodys_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both experts come from disk then."""
    whole, folder = resident("qwen3_moe", F32), checkpoint(tmp_path, "qwen3_moe")
    whole.set_experts_implementation("grouped_mm")
    loader = Unreadable()
    (batch,) = batches(1, 1, 2)
    with torch.inference_mode():
        wanted = whole(**batch).logits
    with penstock.load(folder, Policy(**{**SMALL, "links": LINK, **FEW})) as model:
        monkeypatch.setattr(HostTier, "loader", lambda tier: loader)
        for _ in range(30):
            disk_bytes(model, batch, wanted)
        assert loader.num_loads >= 2
        assert penstock.statistics(model).host_experts_exchanged == 0
    assert loader.is_closed


def test_shared_memory_keeps_the_experts_it_has(tmp_path: Path) -> None:
    whole, folder = resident("qwen3_moe", F32), checkpoint(tmp_path, "qwen3_moe")
    whole.set_experts_implementation("grouped_mm")
    (batch,) = batches(1, 1, 2)
    with torch.inference_mode():
        wanted = whole(**batch).logits
    policy = Policy(**{**SMALL, "links": LINK, **FEW}, host_shared=True)
    with penstock.load(folder, policy) as model:
        for _ in range(24):
            disk_bytes(model, batch, wanted)
        assert penstock.statistics(model).host_experts_exchanged == 0


class Failing(nn.Module):
    """An activation that fails in its call number `at`."""

    def __init__(self, own: nn.Module, at: int) -> None:
        super().__init__()
        self.own, self.at = own, at

    def forward(self, states: torch.Tensor) -> Any:
        self.at -= 1
        if self.at == 0:
            raise RuntimeError("no more")
        return self.own(states)


@pytest.mark.parametrize("in_sweep", [False, True])
def test_a_failure_within_a_piece_leaves_nothing(
    tmp_path: Path, in_sweep: bool
) -> None:
    whole, folder = resident("qwen3_moe", F32), checkpoint(tmp_path, "qwen3_moe")
    with streamed(folder, layer_bytes(whole)) as model:
        experts = model.model.layers[1].mlp.experts
        own, (batch,) = experts.act_fn, batches(1)
        for at in (1, 5):
            experts.act_fn = Failing(own, at)
            with pytest.raises(RuntimeError, match="no more"):
                _ = generated(model, 3, coalesce=False) if in_sweep else model(**batch)
            experts.act_fn = own
            assert not engine_of(model)._entry.open_sites.routing.asked_windows
            assert torch.equal(generated(model, 3), expected(whole, 3))


def test_a_sweep_that_is_left_within_experts_leaves_nothing(tmp_path: Path) -> None:
    whole, folder = resident("qwen3_moe", F32), checkpoint(tmp_path, "qwen3_moe")
    num_bytes = 6 * expert_bytes(whole) + (64 << 10)
    with streamed(folder, num_bytes) as model:
        with penstock.sweep(model, coalesce=False) as sweep:
            done = sweep.run(lambda b: model(**b).logits, batches(4))
            next(iter(done))
        assert not engine_of(model)._entry.open_sites.routing.asked_windows
        assert torch.equal(generated(model, 3), expected(whole, 3))


def test_a_stack_can_be_given_other_values(tmp_path: Path) -> None:
    whole, folder = resident("qwen3_moe", F32), checkpoint(tmp_path, "qwen3_moe")
    name = "model.layers.1.mlp.experts.down_proj"
    old = whole.get_parameter(name).detach().clone()
    with streamed(folder, layer_bytes(whole)) as model:
        model(**batches(1)[0])
        penstock.update(model, {name: old.flip(0)})
        try:
            with torch.no_grad():
                whole.get_parameter(name).copy_(old.flip(0))
            assert torch.equal(generated(model, 2), expected(whole, 2))
        finally:
            with torch.no_grad():
                whole.get_parameter(name).copy_(old)


def test_a_whole_stack_is_loaded_on_the_spot(tmp_path: Path) -> None:
    whole, folder = resident("qwen3_moe", F32), checkpoint(tmp_path, "qwen3_moe")
    name = "model.layers.1.mlp.experts.gate_up_proj"
    with streamed(folder, layer_bytes(whole)) as model:
        total = model.get_parameter(name).sum()
        assert torch.equal(total, whole.get_parameter(name).sum())
        assert penstock.statistics(model).faults == {name: 1}


def test_what_would_change_experts_unseen_is_refused(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path, "qwen3_moe")
    with streamed(folder, 1 << 20) as model:
        experts = model.model.layers[1].mlp.experts
        with pytest.raises(penstock.PenstockError, match="written to"):
            parametrize.register_parametrization(experts, "down_proj", nn.Tanh())
        weight = nn.Parameter(torch.zeros(experts.down_proj.shape))
        experts.down_proj = weight
        with pytest.raises(penstock.PenstockError, match="replaced"):
            model(**batches(1)[0])


def test_unwrapped_experts_are_what_they_were(tmp_path: Path) -> None:
    whole, folder = resident("qwen3_moe", F32), checkpoint(tmp_path, "qwen3_moe")
    model = streamed(folder, layer_bytes(whole))
    own = type(whole.model.layers[1].mlp.experts)
    assert isinstance(model.model.layers[1].mlp.experts, own)
    penstock.unwrap(model)
    assert type(model.model.layers[1].mlp.experts) is own


@pytest.mark.parametrize("way", ["eager", "batched_mm"])
def test_experts_of_odd_sizes_give_the_bits_of_the_whole(
    tmp_path: Path, way: str
) -> None:
    """Their addresses modulo 64 bytes would be others in pieces: they stay whole."""
    folder = checkpoint(tmp_path, "odd")
    whole = AutoModelForCausalLM.from_pretrained(folder).train(False)
    whole.set_experts_implementation(way)
    with streamed(folder, layer_bytes(whole) + (64 << 10)) as model:
        model.set_experts_implementation(way)
        with torch.inference_mode():
            for batch in batches(3):
                assert torch.equal(model(**batch).logits, whole(**batch).logits)


def test_experts_stay_whole_where_all_fits(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path, "qwen3_moe")
    with streamed(folder, 64 << 20) as model:
        assert not engine_of(model).model_division.stacks
    with streamed(folder, 1 << 20, host_memory="64MiB") as model:
        assert not engine_of(model).model_division.stacks, "used where they lie"

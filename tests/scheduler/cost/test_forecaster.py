"""Forecasts under many policies: what is worked out once is what it always was."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, ClassVar

import pytest
from hypothesis import given
from hypothesis import strategies as st

from penstock.io.errors import DoesNotFitError
from penstock.offload.machines.machine import Machine
from penstock.offload.plans.forecast import Forecaster
from penstock.offload.policy import Policy
from penstock.offload.tasks.score_task import Score
from penstock.offload.units import division, sites
from penstock.offload.weights.blueprint import blueprint
from penstock.offload.weights.hf import Skeleton
from penstock.scheduler.cost.model import CostModel
from penstock.scheduler.cost.pipeline import WeightLoad, run_passes
from penstock.scheduler.cost.rates import Curve, Rates
from penstock.scheduler.cost.shape import (
    MicroBatchShape,
    ModelShape,
    Settings,
    SiteCost,
    UnitCost,
)

MIB = 1 << 20
MACHINE = Machine(
    name="small",
    source="a test",
    host_memory="8GiB",
    matmul={"float32": {1: 2e9, 512: 2e11}},
    disk={"bandwidth": {"threads": "1GB"}},
)
MIXTRAL = {
    "architectures": ["MixtralForCausalLM"],
    "model_type": "mixtral",
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_local_experts": 4,
    "vocab_size": 2000,
    "dtype": "float32",
}
BUDGETS = [MIB * size // 2 for size in (3, 5, 6, 8, 12, 16, 24, 40, 64, 200)]


@pytest.fixture(scope="module")
def mixtral(tmp_path_factory: pytest.TempPathFactory) -> Skeleton:
    folder: Path = tmp_path_factory.mktemp("mixtral")
    (folder / "config.json").write_text(json.dumps(MIXTRAL))
    return blueprint(folder, "float32")[0]


def said_or_refused(forecaster: Forecaster, policy: Policy) -> tuple[Any, ...] | str:
    try:
        found = forecaster.forecast(policy)
    except DoesNotFitError as error:
        return str(error)
    return found.shape, found.model.settings, found.bytes_by_tier


@pytest.mark.slow
def test_a_forecaster_that_knows_other_budgets_says_what_a_new_one_does(
    mixtral: Skeleton,
) -> None:
    """Down to blocks that are divided, and budgets that nothing fits into."""
    forecaster = Forecaster(mixtral.model, mixtral.recipes, MACHINE, Score())
    num_sites, refused = set(), 0
    model_bytes = sum(recipe.nbytes for recipe in mixtral.recipes.values())
    for budget in BUDGETS + BUDGETS[::-1]:
        policy = Policy(device_memory=budget)
        new = said_or_refused(
            Forecaster(mixtral.model, mixtral.recipes, MACHINE, Score()), policy
        )
        assert said_or_refused(forecaster, policy) == new
        if isinstance(new, str):
            refused += 1
        else:
            num_sites.add(len(new[0].sites))
            assert sum(new[2].values()) == model_bytes, "each expert counts once"
    assert len(num_sites) > 1, "some budgets divide blocks"
    assert refused


def test_the_model_is_looked_at_once_for_each_way_to_divide_it(
    mixtral: Skeleton, monkeypatch: pytest.MonkeyPatch
) -> None:
    limits: list[int] = []
    find = sites.find

    def counted(*args: Any, **kwargs: Any) -> Any:
        limits.append(kwargs["max_site_bytes"])
        return find(*args, **kwargs)

    monkeypatch.setattr(division, "find", counted)
    forecaster = Forecaster(mixtral.model, mixtral.recipes, MACHINE, Score())
    for budget in range(100 * MIB, 140 * MIB, MIB):
        forecaster.forecast(Policy(device_memory=budget))
    assert len(limits) == 1


class Counted(Curve):
    """Counts how often it is asked."""

    asked: ClassVar[list[float]] = []

    def at(self, x: float) -> float:
        self.asked.append(x)
        return super().at(x)


def test_equal_sites_are_worked_out_once() -> None:
    def asked(num: int) -> int:
        site = SiteCost("", flops_per_token=1e6, weight_bytes=1e5, attention_width=64)
        sites = tuple(SiteCost(f"{i}", *site_values(site)) for i in range(num))
        units = tuple(UnitCost(f"{i}", (i,), 10, 10) for i in range(num))
        rates = Rates(Counted.of({1: 1e9}), Curve.of({1: 1e9}), 1e9, 1e9, 1e9, {})
        settings = Settings(("device",) * num, 1000, lookahead=2, logits_bytes=1)
        model = CostModel(ModelShape(sites, units, 4, 8), rates, settings)
        Counted.asked.clear()
        cost = model.scoring([MicroBatchShape(2, 8), MicroBatchShape(1, 8)])
        assert cost.compute_seconds == pytest.approx(num * alone(model, site))
        return len(Counted.asked)

    assert asked(40) == asked(1) > 0


def site_values(site: SiteCost) -> list[Any]:
    return [getattr(site, name) for name in SiteCost.__slots__[1:]]


def alone(model: CostModel, site: SiteCost) -> float:
    batches = (MicroBatchShape(2, 8), MicroBatchShape(1, 8))
    return sum(model._scored(site, batch) for batch in batches)


def plainly(
    compute: list[float], loads: list[list[WeightLoad]], room_bytes: int, passes: int
) -> float:
    """The end of the last pass, by looking back at all that was loaded."""
    now, link_free = 0.0, 0.0
    begun: list[float] = []
    held: list[tuple[float, int]] = []
    for seconds, needed in zip(compute * passes, loads * passes, strict=True):
        ready = now
        for load in needed:
            asked = begun[-2] if len(begun) >= 2 else 0.0
            left, free = room_bytes - load.nbytes, 0.0
            for until, nbytes in reversed(held):
                left -= nbytes
                if left < 0:
                    free = until
                    break
            link_free = max(asked, free, link_free) + load.seconds
            ready = max(ready, link_free)
        now = ready + seconds
        if needed:
            begun.append(ready)
            held.append((now, sum(load.nbytes for load in needed)))
    return now


LOADS = st.lists(
    st.builds(WeightLoad, st.just("disk"), st.integers(0, 5), st.floats(0.0, 3.0)),
    max_size=2,
)


@given(st.lists(st.tuples(st.floats(0, 3), LOADS), min_size=1), st.integers(0, 12))
def test_room_is_found_as_by_looking_back_at_all_that_was_loaded(
    sites: list[tuple[float, list[WeightLoad]]], room_bytes: int
) -> None:
    compute, loads = [c for c, _ in sites], [of_site for _, of_site in sites]
    found = run_passes(
        compute,
        loads,
        room_bytes=room_bytes,
        lookahead=2,
        first_compute=compute,
        first_loads=loads,
    )
    ends = [plainly(compute, loads, room_bytes, passes) for passes in (1, 2, 3)]
    assert found.first == ends[0]
    assert found.steady == ends[2] - ends[1]

"""The cost model: what binds, what overlaps, what prefill and decode cost."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from penstock.io.kv.staging import FEW_BYTES, FEW_LAYERS
from penstock.scheduler.cost.memory_need import (
    STAGED_BYTES,
    STAGED_LAYERS,
    generating_need,
    scoring_need,
)
from penstock.scheduler.cost.model import CostModel
from penstock.scheduler.cost.pipeline import WeightLoad, run_passes
from penstock.scheduler.cost.rates import CallCosts, Curve, Rates
from penstock.scheduler.cost.shape import (
    MicroBatchShape,
    ModelShape,
    Settings,
    SiteCost,
    UnitCost,
    split_rows,
)
from penstock.scheduler.cost.workload import Generating, Scoring, predict

MB = 10**6
BLOCK = 100 * MB
NUM = 8


def passes(compute: float, load: float, *, lookahead: int = 2, room: int = 3) -> float:
    loads = [[WeightLoad("disk", BLOCK, load)]] * NUM
    found = run_passes(
        [compute] * NUM,
        loads,
        room_bytes=room * BLOCK,
        lookahead=lookahead,
        first_compute=[compute] * NUM,
        first_loads=loads,
    )
    return found.steady


@pytest.mark.parametrize(("compute", "load"), [(3.0, 1.0), (1.0, 3.0), (2.0, 2.0)])
def test_a_pass_takes_what_binds_it(compute: float, load: float) -> None:
    assert passes(compute, load) == pytest.approx(NUM * max(compute, load))


def test_without_lookahead_or_room_nothing_overlaps() -> None:
    assert passes(2.0, 1.0, lookahead=0) == pytest.approx(NUM * 3.0)
    assert passes(2.0, 1.0, room=1) == pytest.approx(NUM * 3.0)


@given(
    st.lists(st.floats(0.01, 5.0), min_size=1, max_size=12),
    st.floats(0.0, 5.0),
    st.integers(0, 3),
    st.integers(1, 4),
)
def test_a_pass_is_never_faster_than_its_parts_nor_slower_than_their_sum(
    compute: list[float], load: float, lookahead: int, room: int
) -> None:
    loads = [[WeightLoad("disk", BLOCK, load)] for _ in compute]
    found = run_passes(
        compute,
        loads,
        room_bytes=room * BLOCK,
        lookahead=lookahead,
        first_compute=compute,
        first_loads=loads,
    )
    least = max(sum(compute), load * len(compute))
    assert least - 1e-6 <= found.steady <= sum(compute) + load * len(compute) + 1e-6
    assert found.first >= sum(compute)


def test_half_of_the_blocks_behind_a_link_cost_max_of_compute_and_half_the_bytes() -> (
    None
):
    """DESIGN's formula: L max(t_c, f W / B), f = 1/2, spread evenly."""
    for speed in (4.0, 1.0, 0.25):
        loads = [
            [WeightLoad("host", BLOCK, 1.0 / speed)] if i % 2 else [] for i in range(32)
        ]
        found = run_passes(
            [1.0] * 32,
            loads,
            room_bytes=3 * BLOCK,
            lookahead=2,
            first_compute=[1.0] * 32,
            first_loads=loads,
        )
        assert found.steady == pytest.approx(32 * max(1.0, 0.5 / speed), rel=0.01)


def test_a_curve_goes_through_its_points_and_is_flat_outside() -> None:
    curve = Curve.of({1: 10.0, 100: 1000.0})
    assert curve.at(10) == pytest.approx(100.0)
    assert (curve.at(0.1), curve.at(1000)) == (10.0, 1000.0)
    with pytest.raises(ValueError, match="not a curve"):
        Curve.of({})


def shape_of(num: int = NUM, *, flops: float = 2e8, kv: int = 512) -> ModelShape:
    sites = tuple(
        SiteCost(
            f"layers.{i}",
            flops_per_token=flops,
            weight_bytes=BLOCK,
            num_modules=9,
            num_products=7,
            attention_width=1024,
            kv_per_token=kv,
        )
        for i in range(num)
    )
    head = SiteCost("head", 1e7, 5.0 * MB, 1, 1, vocabulary=1000)
    units = tuple(UnitCost(s.name, (i,), BLOCK, BLOCK) for i, s in enumerate(sites))
    last = UnitCost("head", (num,), 5 * MB, 5 * MB)
    return ModelShape((*sites, head), (*units, last), itemsize=4, hidden=1024)


def model_of(
    shape: ModelShape | None = None,
    *,
    disk: float = 1e9,
    tier: str = "disk",
    coalesced: bool = False,
    calls: CallCosts | None = None,
    kv_tier: str = "auto",
) -> CostModel:
    shape = shape or shape_of()
    rates = Rates(
        matmul_flops=Curve.of({1: 2e9, 512: 2e11}),
        attention_flops=Curve.of({1: 1e11}),
        device_bytes=1e10,
        pointwise_bytes=1e10,
        decode_bytes=1e10,
        links={"disk": disk},
        calls=calls or CallCosts(),
    )
    settings = Settings(
        (tier,) * len(shape.units),
        3 * BLOCK,
        lookahead=2,
        logits_bytes=64 << 20,
        kv_tier=kv_tier,
        is_coalesced=coalesced,
    )
    return CostModel(shape, rates, settings)


def test_few_tokens_wait_for_the_disk_and_many_do_not() -> None:
    model = model_of(disk=0.2e9)
    few = model.scoring([MicroBatchShape(1, 64)])
    many = model.scoring([MicroBatchShape(4, 128)] * 16)
    assert (few.binds, many.binds) == ("disk", "compute")
    assert few.steady == pytest.approx((NUM * BLOCK + 5 * MB) / 0.2e9, rel=0.01)


def test_what_stays_on_the_device_is_read_in_the_first_pass_only() -> None:
    cost = model_of(tier="device", disk=0.1e9).scoring([MicroBatchShape(1, 64)])
    assert cost.time.wait == 0.0
    assert cost.first > cost.steady + 5.0


def test_products_that_are_shared_are_faster_in_decode() -> None:
    batches = split_rows(256, 8, 1)
    joint = model_of(tier="device", coalesced=True).decode(batches, 64)
    alone = model_of(tier="device").decode(batches, 64)
    assert joint.steady < alone.steady / 2


def test_a_cache_that_is_appended_to_is_read_once_a_token() -> None:
    """transformers' own is read, written and read again."""
    batches, heavy = [MicroBatchShape(8, 1)], shape_of(kv=2**16)
    seconds = {
        tier: model_of(heavy, tier="device", kv_tier=tier).decode(batches, 4096).steady
        for tier in ("auto", "host")
    }
    more = 2 * 8 * 4096 * heavy.kv_bytes_per_token / 1e10
    assert seconds["auto"] - seconds["host"] == pytest.approx(more)


def test_keys_and_values_on_disk_share_its_link_with_the_weights() -> None:
    batches = [MicroBatchShape(8, 1)]
    there = model_of(kv_tier="disk", disk=1e8).decode(batches, 4096)
    here = model_of(kv_tier="host", disk=1e8).decode(batches, 4096)
    more = 8 * 4096 * shape_of().kv_bytes_per_token / 1e8
    assert there.steady - here.steady == pytest.approx(more, rel=0.01)


def test_calls_cost_by_module_micro_batch_and_job() -> None:
    calls = CallCosts(job=5.0, module=0.1, batch=1.0)
    batches = (MicroBatchShape(1, 64),) * 4
    plain = predict(model_of(tier="device"), Scoring(batches, 2))
    dear = predict(model_of(tier="device", calls=calls), Scoring(batches, 2))
    more = 5.0 + 4 * (1.0 + NUM * 9 * 0.1 + 0.1)
    assert dear.seconds - plain.seconds == pytest.approx(more)
    assert dear.passes == 2


@pytest.mark.parametrize(("tier", "more"), [("auto", 0.0), ("host", 0.25)])
def test_a_tier_of_keys_and_values_costs_calls(tier: str, more: float) -> None:
    """For each micro-batch and layer, whenever tokens come."""
    batches = (MicroBatchShape(2, 8),) * 3
    plain = model_of(tier="device", kv_tier=tier)
    dear = model_of(tier="device", kv_tier=tier, calls=CallCosts(kv_layer=0.25))
    for act in ("prefill", "decode"):
        seconds = [getattr(model, act)(batches, 8.0).steady for model in (plain, dear)]
        assert seconds[1] - seconds[0] == pytest.approx(NUM * 3 * more)


@pytest.mark.parametrize(
    ("measured", "lost"), [(0.0, 0.5 / (1e9 * 2)), (3e-9, 0.5 * 3e-9)]
)
def test_what_is_cast_beside_computing_takes_from_it(
    measured: float, lost: float
) -> None:
    """A share of two cores, or what was measured; where cores are spare, nothing."""
    shape = shape_of()
    units = [
        replace(unit, decoded=(("cast", unit.nbytes // 2),)) for unit in shape.units
    ]
    shape, batches = replace(shape, units=tuple(units)), [MicroBatchShape(8, 128)]
    model = model_of(shape, disk=1e12, calls=CallCosts(cast=measured))
    rates = replace(model.rates, cast_bytes=1e9, num_cores=2, num_cast_threads=99)
    seconds = {
        cores: replace(model, rates=replace(rates, num_cores=cores)).scoring(batches)
        for cores in (0, 2)
    }
    more = seconds[2].steady - seconds[0].steady
    assert more == pytest.approx((NUM * BLOCK + 5 * MB) * lost)


def test_completions_are_a_pass_a_token_and_wave() -> None:
    found = predict(model_of(), Generating(100, 16, 8, in_flight=40, each=8))
    assert found.passes == 3 * 8
    assert found.output_tokens == 800
    assert found.tokens == 100 * 16 + 800


def test_prompts_that_come_in_by_and_by_take_passes() -> None:
    """As many passes as parts; a later part reads the earlier ones."""
    whole = predict(model_of(), Generating(40, 64, 8, in_flight=40, each=8))
    parts = predict(model_of(), Generating(40, 64, 8, 40, 8, chunk_tokens=24))
    assert Generating(40, 64, 8, 40, 8, chunk_tokens=24).chunks == (24, 24, 16)
    assert (whole.passes, parts.passes) == (8, 10)
    assert (whole.tokens, parts.tokens) == (40 * 72, 40 * 72)
    assert parts.seconds > whole.seconds
    one = Generating(40, 64, 8, 40, 8, chunk_tokens=64)
    assert predict(model_of(), one) == whole


def test_what_came_in_before_is_attended_to_and_read() -> None:
    model, batches = model_of(), [MicroBatchShape(8, 16)] * 4
    first, later = model.prefill(batches), model.prefill(batches, 512.0)
    assert later.compute_seconds > first.compute_seconds
    settings = replace(model.settings, kv_tier="disk")
    model = replace(model, settings=settings)
    read = [model.prefill(batches, c).time.busy["disk"] for c in (0.0, 512.0)]
    per_site = 4 * 8 * 512 * model.shape.kv_bytes_per_token / model.rates.links["disk"]
    assert read[1] - read[0] == pytest.approx(per_site)


def test_windows_bound_what_is_attended_to() -> None:
    assert SiteCost("a", attention_window=128).context(4096) == 128
    assert SiteCost("a").context(4096) == 4096


def test_more_in_flight_needs_more_memory() -> None:
    shape = shape_of()
    few, many = (scoring_need(shape, n, 512, 64 * MB).activations for n in (512, 4096))
    assert many - few == 3584 * 1024 * 4 * 3
    kv = [generating_need(shape, n, 100, 28, 8).kv for n in (1, 64)]
    assert kv == [128 * shape.kv_bytes_per_token, 64 * 128 * shape.kv_bytes_per_token]


def test_what_is_appended_is_written_over_the_link_that_it_is_read_from() -> None:
    batches = [MicroBatchShape(8, 64)]
    there = model_of(kv_tier="disk", disk=1e7).prefill(batches)
    here = model_of(kv_tier="host", disk=1e7).prefill(batches)
    more = 8 * 64 * shape_of().kv_bytes_per_token / 1e7
    assert there.steady - here.steady == pytest.approx(more, rel=0.01)


def test_activations_come_over_the_link_of_the_weights_in_host_memory() -> None:
    def steady(*, moves: bool) -> float:
        model = model_of(tier="host")
        rates = replace(model.rates, links={"host": 1e7}, out_bytes=1e9)
        settings = replace(model.settings, activations_move=moves)
        return replace(model, rates=rates, settings=settings).scoring(batches).steady

    batches = [MicroBatchShape(1, 1024)]
    each = 1024 * 1024 * 4 / 1e7
    more = steady(moves=True) - steady(moves=False)
    assert more == pytest.approx((NUM + 1) * each, rel=0.01)


def test_keys_and_values_of_fewer_bits_move_fewer_bytes() -> None:
    model = model_of(kv_tier="disk", disk=1e7)
    less = replace(model, settings=replace(model.settings, kv_itemsize=1.0))
    weights = (NUM * BLOCK + 5 * MB) / 1e7
    whole, quarter = (
        found.decode([MicroBatchShape(8, 1)], 4096).steady - weights
        for found in (model, less)
    )
    assert whole == pytest.approx(4 * quarter, rel=0.01)


def test_what_waits_on_the_host_is_off_the_device() -> None:
    shape = shape_of()
    here = scoring_need(shape, 8192, 512, 0)
    there = scoring_need(shape, 8192, 512, 0, waits_on_host=True)
    assert there.waiting == 8192 * 1024 * 4 * 3
    assert here.activations - there.activations == (8192 - 3 * 512) * 1024 * 4 * 3
    assert there.beside_weights("auto", is_shared=False)[1] == there.waiting


def test_keys_and_values_count_where_they_are() -> None:
    need = generating_need(shape_of(), 64, 100, 28, 8, is_staged=True, pending=7)
    other = need.activations + need.staging
    strip = 8 * 128 * 512 * 4 * 9 // 8
    assert need.staging == 8 * strip  # of all eight groups
    for asked, least in (
        (None, 256 << 20),
        (1 << 20, strip),
        (5 * strip, 5 * strip),
    ):
        many = generating_need(
            shape_of(), 8000, 100, 28, 8, is_staged=True, staging_bytes=asked
        )
        assert many.staging == least
    wide = generating_need(shape_of(), 8000, 100, 28, 400, is_staged=True)
    assert wide.staging == 3 * 50 * strip
    for tier, wanted in (
        ("auto", (other + need.kv, 7)),
        ("device", (other + need.kv, 7)),
        ("host", (other, 7 + need.kv)),
        ("disk", (other, 7)),
    ):
        assert need.beside_weights(tier, is_shared=False) == wanted
        assert need.beside_weights(tier, is_shared=True) == (sum(wanted), 0)


def test_as_much_is_planned_to_be_staged_as_is() -> None:
    assert (STAGED_LAYERS, STAGED_BYTES) == (FEW_LAYERS, FEW_BYTES)


def test_what_comes_from_disk_crosses_a_gpus_link_to_host_memory() -> None:
    """Half of the weights there, half on a drive as fast as the link: one way in."""
    model = model_of()
    half = (*tuple("host" if i % 2 else "disk" for i in range(NUM)), "disk")
    settings = replace(model.settings, placement=half)
    seconds = []
    for crosses in (False, True):
        links = {"disk": 1e8, "host": 1e8}
        rates = replace(model.rates, links=links, crosses_host=crosses)
        found = replace(model, rates=rates, settings=settings)
        seconds.append(found.scoring([MicroBatchShape(1, 64)]).steady)
    whole = (NUM * BLOCK + 5 * MB) / 1e8
    assert seconds[1] == pytest.approx(whole, rel=0.01)
    assert seconds[0] < 0.6 * whole

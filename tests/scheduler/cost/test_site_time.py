"""Experts, latents, windows and states, in time and in memory."""

from __future__ import annotations

from dataclasses import replace

import pytest

from penstock.scheduler.cost.memory_need import cache_bytes, generating_need
from penstock.scheduler.cost.rates import Curve, Rates
from penstock.scheduler.cost.shape import ModelShape, SiteCost
from penstock.scheduler.cost.site_time import (
    SiteCalls,
    expansion_seconds,
    product_seconds,
)

RATES = Rates(
    matmul_flops=Curve.of({1: 1e9, 1000: 1e12}),
    attention_flops=Curve.of({1: 1e12}),
    device_bytes=1e12,
    pointwise_bytes=1e12,
    decode_bytes=1e12,
    links={},
)
SPARSE = SiteCost(
    "experts",
    flops_per_token=3e6,
    weight_bytes=40e6,
    expert_flops_per_token=2e6,
    expert_weight_bytes=32e6,
    expert_share=1 / 8,
)


def test_a_product_with_an_expert_has_only_the_rows_that_are_sent_to_it() -> None:
    seconds = product_seconds(RATES, SPARSE, SiteCalls(800, 800, 800))
    dense = 1e6 * 800 / RATES.matmul_flops.at(800)
    assert seconds == pytest.approx(
        dense + 2e6 * 800 / RATES.matmul_flops.at(100), rel=1e-9
    )


def test_products_with_experts_are_not_joined() -> None:
    joined = product_seconds(RATES, SPARSE, SiteCalls(800, 800, 100))
    alone = product_seconds(RATES, SPARSE, SiteCalls(800, 100, 100))
    once = product_seconds(RATES, SPARSE, SiteCalls(800, 800, 800))
    assert once < joined < alone


def test_only_experts_that_are_hit_are_read() -> None:
    assert SPARSE.hit_share(1) == pytest.approx(1 / 8)
    assert SPARSE.hit_share(64) > 0.99
    slow = replace(RATES, device_bytes=1e6, matmul_flops=Curve.of({1: 1e15}))
    one = product_seconds(slow, SPARSE, SiteCalls(1, 1, 1))
    assert one == pytest.approx((8e6 + 32e6 / 8) / 1e6, rel=1e-6)


def test_latents_are_expanded_for_all_tokens_that_are_attended_to() -> None:
    latent = SiteCost("attention", expanded_per_token=300, expanded_flops=1e6)
    seconds = expansion_seconds(RATES, latent, 4, 1000, 2)
    flops = 4000 * 1e6 / RATES.matmul_flops.at(4000)
    assert seconds == pytest.approx(flops + 4000 * 300 * 2 * 3 / 1e12)
    assert expansion_seconds(RATES, SiteCost("other"), 4, 1000, 2) == 0


def shape_of(*sites: SiteCost, state_bytes: int = 0) -> ModelShape:
    return ModelShape(sites, (), 2, 64, state_bytes=state_bytes)


def test_windows_keep_one_less_than_their_tokens_and_a_store_has_room_for_two() -> None:
    shape = shape_of(SiteCost("a", kv_per_token=10, attention_window=8))
    assert cache_bytes(shape, 3, 100, 28).kv == 3 * 7 * 10 * 2
    assert cache_bytes(shape, 3, 100, 28, is_stored=True).kv == 3 * 16 * 10 * 2
    assert cache_bytes(shape, 3, 2, 3).kv == 3 * 5 * 10 * 2


def test_states_and_what_no_tier_keeps_stay_on_the_device() -> None:
    site = SiteCost("a", kv_per_token=10, own_kv_per_token=4, state_bytes=100)
    found = cache_bytes(shape_of(site, state_bytes=50), 2, 8, 2, kv_itemsize=1.0)
    assert found.kv == 2 * 10 * 10
    assert found.states == 2 * (100 + 50 + 4 * 10 * 2)
    need = generating_need(shape_of(site), 2, 8, 2, 1)
    on_disk, _ = need.beside_weights("disk", is_shared=False)
    assert on_disk == need.activations + need.states
    assert need.states == 2 * (100 + 4 * 10 * 2)


def test_behind_an_encoder_only_new_tokens_are_added() -> None:
    site = SiteCost("a", kv_per_token=10, cross_kv_per_token=6)
    assert cache_bytes(shape_of(site), 2, 100, 5).kv == 2 * (5 * 10 + 100 * 6) * 2


def test_what_is_expanded_is_in_the_workspace() -> None:
    plain = shape_of(SiteCost("a", kv_per_token=10, pointwise_per_token=40))
    (site,) = plain.sites
    latent = replace(plain, sites=(replace(site, expanded_per_token=300),))
    needs = [
        generating_need(shape, 64, 4000, 96, 16, chunk_tokens=1).activations
        for shape in (plain, latent)
    ]
    assert needs[1] - needs[0] == 16 * 4096 * 300 * 2

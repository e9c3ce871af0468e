"""Several chips: published figures met, formulas as the paper derives them."""

from __future__ import annotations

import math

import pytest

import published
from penstock.scheduler.cost.partitioning import (
    Blocks,
    Chips,
    LayoutCost,
    best_gather,
    gather_crossover_tokens,
    gathered_bytes,
    layer_bytes,
    layout_costs,
    one_dimensional_bytes,
    two_dimensional_bytes,
)


@pytest.mark.parametrize("row", published.palm_contexts(), ids=lambda row: row.what)
def test_contexts_of_table_1_to_two_percent(row: published.Row) -> None:
    assert row.ratio == pytest.approx(1.0, abs=0.02)


@pytest.mark.parametrize("row", published.palm_latencies(), ids=lambda row: row.what)
def test_latencies_of_tables_2_and_3_to_a_quarter(row: published.Row) -> None:
    assert row.ratio == pytest.approx(1.0, abs=0.25)


@pytest.mark.parametrize("row", published.zero_nvme(), ids=lambda row: row.what)
def test_zero_inference_from_nvme_to_a_quarter(row: published.Row) -> None:
    assert row.ratio == pytest.approx(1.0, abs=0.25)


@pytest.mark.parametrize("row", published.cpu_rows(), ids=lambda row: row.what)
def test_nobody_is_above_the_ceiling_of_the_link(row: published.Row) -> None:
    assert 0 < row.ratio <= 1.0


def test_two_dimensions_move_less_from_four_times_the_ratio_of_widths() -> None:
    hidden, wide, tokens = 1024, 4096, 7
    one = one_dimensional_bytes(tokens, hidden, 2)
    assert two_dimensional_bytes(tokens, hidden, wide, 15, 2) > one
    assert two_dimensional_bytes(tokens, hidden, wide, 17, 2) < one
    assert two_dimensional_bytes(tokens, hidden, wide, 16, 2) == pytest.approx(one)


def test_gathering_over_the_best_number_moves_least() -> None:
    tokens, hidden, wide, num = 65536, 18432, 73728, 64
    best = best_gather(tokens, wide, num)
    moved = {
        over: gathered_bytes(tokens, hidden, wide, num, over, 2)
        for over in range(1, num + 1)
    }
    nearest = min(moved, key=lambda over: moved[over])
    assert nearest in (math.floor(best), math.ceil(best))


def test_few_tokens_keep_weights_where_they_are_and_many_gather_them() -> None:
    few = layer_bytes(64, published.PALM_540B, 64)
    many = layer_bytes(2**20, published.PALM_540B, 64)
    assert min(few, key=lambda layout: few[layout]) == "2d"
    assert min(many, key=lambda layout: many[layout]).startswith("gathered")


def test_the_crossover_of_streaming() -> None:
    """Llama-70B: 26,000 tokens, OPT-30B 21,500."""
    llama = gather_crossover_tokens(2 * 70e9 / 80, 8192, 2)
    opt = gather_crossover_tokens(2 * 30e9 / 48, 7168, 2)
    assert llama == pytest.approx(26_000, rel=0.05)
    assert opt == pytest.approx(21_500, rel=0.05)


A_70B = Blocks(70e9, 80, 8192, 28672, kv_heads=8, head_size=128)
EIGHT = Chips(8, 989e12, 80e9, 3.35e12, 450e9)


def costs_of(tokens: float, link: float = 55e9) -> dict[str, LayoutCost]:
    found = layout_costs(tokens, A_70B, EIGHT, link_bandwidth=link, itemsize=2)
    return {cost.name: cost for cost in found}


def test_weights_or_tokens_move_less_on_the_two_sides_of_the_crossover() -> None:
    at = gather_crossover_tokens(2 * 70e9 / 80, 8192, 2)
    for tokens, gathers in ((0.9 * at, False), (1.1 * at, True)):
        found = costs_of(tokens)
        gather, keep = found["gather-stream"], found["TP-stream"]
        assert (gather.network_seconds < keep.network_seconds) is gathers


def test_weights_come_beside_computing_and_tokens_do_not() -> None:
    found = costs_of(2**20)
    gather, keep = found["gather-stream"], found["TP-stream"]
    assert gather.pass_seconds == gather.compute_seconds
    assert keep.pass_seconds == keep.compute_seconds + keep.network_seconds
    slow = costs_of(64, link=1e9)
    assert slow["TP-stream"].pass_seconds == pytest.approx(140 / 8)


def test_a_chip_holds_its_share_or_two_layers_at_a_time() -> None:
    held = {name: cost.chip_bytes for name, cost in costs_of(64).items()}
    assert held["weight-stationary 1D"] == held["weight-stationary 2D"] == 140e9 / 8
    assert held["gather-stream"] == 2 * 140e9 / 80
    assert held["TP-stream"] == held["gather-stream"] / 8


def test_what_stays_needs_no_link() -> None:
    assert costs_of(64)["weight-stationary 1D"].link_seconds == 0.0
    fast, slow = (costs_of(64, link)["weight-stationary 1D"] for link in (55e9, 1e6))
    assert fast == slow

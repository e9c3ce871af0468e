"""What stays is spread evenly, fits, and is as much as fits."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from penstock.io.errors import PolicyError
from penstock.scheduler.placement import place, spread

SIZES = st.lists(st.integers(1, 1000), max_size=40)


@given(sizes=SIZES, budget=st.integers(0, 20_000))
def test_what_stays_fits_and_nothing_more_would(sizes: list[int], budget: int) -> None:
    chosen = spread(sizes, budget)
    assert list(chosen) == sorted(set(chosen))
    left = budget - sum(sizes[unit] for unit in chosen)
    assert left >= 0
    others = [size for unit, size in enumerate(sizes) if unit not in chosen]
    assert all(size > left for size in others)


@given(num=st.integers(1, 60), stay=st.integers(0, 60), size=st.integers(1, 1 << 40))
def test_equal_units_are_spread_evenly(num: int, stay: int, size: int) -> None:
    stay = min(stay, num)
    chosen = spread([size] * num, stay * size)
    assert len(chosen) == stay
    for end in range(1, num + 1):
        so_far = sum(unit < end for unit in chosen)
        assert abs(so_far - stay * end / num) <= 1


def test_half_of_the_blocks_stay_in_turns() -> None:
    assert spread([10] * 8, 40) == (1, 3, 5, 7)
    assert spread([10] * 8, 0) == ()
    assert spread([10] * 8, 1000) == tuple(range(8))


# Rules first, then what is left, tier by tier.

NAMES = ("embed", "block.0.attention", "block.0.mlp", "block.1", "block.10", "head")
RULES = ("^embed$", "block", r"block\.1", r"\.mlp", "head|norm", "0", "nothing", "")
TIERS = ("device", "cuda:1", "host", "disk")


@given(st.data())
def test_every_unit_stands_where_a_rule_or_the_room_says(data: st.DataObject) -> None:
    names = data.draw(st.lists(st.sampled_from(NAMES), max_size=12), "names")
    sizes = data.draw(
        st.lists(st.integers(1, 9), min_size=len(names), max_size=len(names)), "sizes"
    )
    order = data.draw(st.permutations(TIERS[:3]), "order")
    budgets = {tier: data.draw(st.integers(0, 40), tier) for tier in order}
    rules = {
        rule: data.draw(st.sampled_from(TIERS), rule)
        for rule in data.draw(st.lists(st.sampled_from(RULES), unique=True), "rules")
    }
    ruled = [
        [tier for rule, tier in rules.items() if re.search(rule, name)][:1]
        for name in names
    ]
    asked = {
        tier: sum(size for size, by in zip(sizes, ruled, strict=True) if by == [tier])
        for tier in order
    }
    too_much = {tier for tier in order if asked[tier] > budgets[tier]}
    if too_much:
        with pytest.raises(PolicyError, match=r"^placement puts") as error:
            place(sizes, names, budgets=budgets, rules=rules)
        assert any(
            f"puts {asked[tier]} bytes into {tier!r}, which has room for "
            f"{budgets[tier]}: raise" in str(error.value)
            for tier in too_much
        )
        return
    found = place(sizes, names, budgets=budgets, rules=rules)
    assert len(found) == len(names)
    assert set(found) <= set(TIERS)
    left = dict(budgets)
    for size, tier in zip(sizes, found, strict=True):
        if tier != "disk":
            left[tier] -= size
    assert all(budget >= 0 for budget in left.values())
    for size, tier, by in zip(sizes, found, ruled, strict=True):
        if by:
            assert tier == by[0]
            continue
        preferred = order[: order.index(tier)] if tier in order else order
        assert all(size > left[better] for better in preferred)


def test_each_tier_is_spread_over_what_the_ones_before_it_left() -> None:
    found = place(
        [10] * 8,
        [f"block.{unit}" for unit in range(8)],
        budgets={"device": 40, "host": 20},
        rules={},
    )
    device, host, disk = "device", "host", "disk"
    assert found == (disk, device, host, device, disk, device, host, device)


def test_a_rule_takes_room_before_anything_is_spread() -> None:
    found = place(
        [10] * 4,
        ["a", "b", "c", "d"],
        budgets={"device": 20},
        rules={"a": "device", "[ab]": "disk"},
    )
    assert found == ("device", "disk", "disk", "device")


def test_a_rule_may_put_a_unit_of_no_bytes_where_there_is_no_room() -> None:
    assert place([0], ["a"], budgets={}, rules={"a": "host"}) == ("host",)


@pytest.mark.parametrize(
    ("tier", "key"),
    [
        ("device", "device_memory"),
        ("host", "host_memory"),
        ("peer", "peer"),
        ("cuda:1", r"peer\.cuda:1"),
    ],
)
def test_too_much_for_a_tier_names_the_key_to_raise(tier: str, key: str) -> None:
    budgets = {} if tier == "peer" else {tier: 19}
    room = budgets.get(tier, 0)
    with pytest.raises(
        PolicyError,
        match=rf"^placement puts 20 bytes into '{tier}', which has room for {room}: "
        rf"raise {key}, or let fewer units match$",
    ):
        place([10, 10], ["a", "b"], budgets=budgets, rules={"": tier})


@pytest.mark.parametrize("rule", ["^(a|a)+!", "^(a|aa)+!"])
def test_an_expression_that_would_be_tried_for_ever_is_refused(rule: str) -> None:
    with pytest.raises(PolicyError, match="takes more than"):
        place([1], ["a" * 60 + "b!"], budgets={}, rules={rule: "disk"})

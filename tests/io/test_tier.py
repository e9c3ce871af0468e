"""A tier is its name wherever names are written, and knows how fast it is."""

from __future__ import annotations

import json
import pickle

import pytest

from penstock.io.tier import KV_TIERS, Tier, tier_of
from penstock.offload.policy import Policy


def test_it_is_written_as_its_name() -> None:
    assert f"{Tier.HOST} {Tier.HOST!r} {json.dumps({Tier.HOST: 1})}" == (
        "host 'host' {\"host\": 1}"
    )
    counts: dict[str, int] = {Tier.HOST: 1}
    assert counts["host"] == 1
    assert pickle.loads(pickle.dumps(Tier.DISK)) is Tier.DISK


def test_they_are_ordered_by_speed() -> None:
    assert [tier.rank for tier in Tier] == [0, 1, 2, 3]
    assert [tier.rank for tier in KV_TIERS] == [0, 2, 3]


@pytest.mark.parametrize(
    ("place", "tier"),
    [("host", Tier.HOST), ("cuda:1", Tier.PEER), ("cpu", Tier.PEER), ("peer", "peer")],
)
def test_a_device_is_a_peer(place: str, tier: Tier) -> None:
    assert tier_of(place) is Tier(tier)


def test_their_settings_are_the_policys() -> None:
    settings = {tier.setting for tier in Tier} - {None}
    assert settings <= set(Policy.model_fields)

"""Whatever a policy asks for, outputs are the same and no budget is exceeded."""

from __future__ import annotations

from random import Random
from typing import Any

import pytest
import torch
from torch import nn

import penstock
from nets import WIDTH, batches, make, same, serially
from penstock import Policy
from penstock.io.errors import PolicyError
from penstock.offload.model import engine_of
from shares import shared

pytestmark = pytest.mark.usefixtures("no_leaks")

NUM_POLICIES = 200
KIB = 1 << 10


class Uneven(nn.Module):
    """Layers of all sizes, one of them run twice, and a head tied to the embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(WIDTH, 3 * WIDTH, bias=False)
        self.wide = nn.Linear(3 * WIDTH, WIDTH)
        self.norm = nn.LayerNorm(WIDTH)
        self.blocks = nn.ModuleList(
            nn.Sequential(
                nn.Linear(WIDTH, WIDTH * (1 + i % 3)),
                nn.Tanh(),
                nn.Linear(WIDTH * (1 + i % 3), WIDTH),
            )
            for i in range(5)
        )
        self.shared = nn.Linear(WIDTH, WIDTH)
        self.head = nn.Linear(WIDTH, 3 * WIDTH, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.norm(self.wide(self.embed(x)))
        for block in self.blocks:
            x = x + block(x)
            x = torch.tanh(self.shared(x))
        found: torch.Tensor = self.head(x)
        return found


RULES = ("embed", "wide", r"blocks\.[02]", r"blocks\.\d", "shared", "head", "", "none")
TIERS = ("device", "peer", "cpu", "host", "disk")


def random_policy(random: Random) -> dict[str, Any]:
    def size(least: int, most: int) -> int:
        return random.randrange(least * KIB, most * KIB)

    values: dict[str, Any] = {
        "device_memory": size(96, 260),
        "lookahead": random.randrange(4),
        "resident_below": random.choice([1, 300, 1 << 20]),
        "io": {
            "reader": random.choice(["threads", "libaio", "aiofiles"]),
            "threads": random.randrange(1, 4),
            "chunk": size(1, 40),
            "max_gap": size(1, 40),
            "direct": random.random() < 0.7,
        },
    }
    if random.random() < 0.6:
        values["host_memory"] = size(1, 200)
    if random.random() < 0.6:
        values["peer"] = {"cpu": size(1, 200)}
    if random.random() < 0.5:
        values["staging_memory"] = size(1, 200)
    values["links"] = {
        tier: {"bandwidth": "1000TB"}
        for tier in ("peer", "host", "disk")
        if random.random() < 0.5
    }
    values["placement"] = {
        rule: random.choice(TIERS)
        for rule in random.sample(RULES, random.randrange(4))
        if random.random() < 0.7
    }
    return values


def wrapped(module: Any, values: dict[str, Any]) -> Policy:
    """Streams `module`; without rules where they ask for more than there is."""
    try:
        penstock.wrap(module, policy := Policy(**values))
    except PolicyError as error:
        if not str(error).startswith("placement puts "):
            raise
        penstock.wrap(module, policy := Policy(**{**values, "placement": {}}))
    return policy


@pytest.mark.parametrize(
    "seed", shared(range(NUM_POLICIES), lambda seed, _: seed % 4 == 0)
)
def test_whatever_is_asked_for_outputs_are_equal_and_budgets_are_kept(
    seed: int,
) -> None:
    module = make(Uneven)
    items = batches(4)
    expected = serially(module, items)
    values = random_policy(Random(seed))
    policy = wrapped(module, values)
    try:
        assert same(serially(module, items), expected), values
        with penstock.sweep(module, width=3) as sweep:
            assert same(sweep.map(module, items), expected), values
        statistics = penstock.statistics(module)
        assert isinstance(policy.device_memory, int)
        assert statistics.device_memory_bytes <= policy.device_memory
        assert statistics.peak_device_bytes <= statistics.device_memory_bytes
        assert sum(statistics.bytes_by_tier.values()) == statistics.model_bytes
        tiers = engine_of(module)._tiers
        if tiers.host is not None:
            assert policy.host_memory is not None
            assert tiers.host.memory.nbytes <= policy.host_memory
        for peer in tiers.peers:
            assert peer.memory.nbytes <= policy.peer["cpu"]
        for tier, held in (("host", tiers.host), ("peer", tiers.peers)):
            assert bool(statistics.bytes_by_tier[tier]) == bool(held), tier
        assert statistics.faults == {}
    finally:
        penstock.unwrap(module)
    assert same(serially(module, items), expected)


def test_the_policies_are_not_all_alike() -> None:
    """Else the test above says less than it seems to."""
    found = [random_policy(Random(seed)) for seed in range(NUM_POLICIES)]
    assert len({repr(values) for values in found}) == NUM_POLICIES
    mixed = [v for v in found if v.get("peer") and v.get("host_memory") and v["links"]]
    assert len(mixed) > 20
    assert any("host" in v["links"] for v in mixed)
    assert any("host" not in v["links"] for v in mixed)
    assert {tier for v in found for tier in v["placement"].values()} == set(TIERS)

"""Tiers that keep weights as they are stored give the bits of those that do not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import penstock
from checkpoint import make_checkpoint
from checkpoints import same_bits
from penstock import Policy
from penstock.io.errors import UsageError
from penstock.offload.model import engine_of
from quantised import dequantised, fp8_of, fp8_section, original, quantised

pytestmark = pytest.mark.usefixtures("no_leaks")

IDS = torch.arange(14).view(2, 7) + 3
TIERS: dict[str, dict[str, Any]] = {
    "host": {"host_memory": "1MiB"},
    "some on the host": {"host_memory": "90KiB"},
    "peer": {"peer": {"cpu": "1MiB"}},
    "links": {
        "host_memory": "90KiB",
        "links": {"host": {"bandwidth": "1GB"}, "disk": {"bandwidth": "1GB"}},
    },
}


@pytest.fixture(scope="module")
def fp8(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("accelerate", reason="transformers reads FP8 only with it")

    def blocks_of(name: str, weight: torch.Tensor) -> dict[str, torch.Tensor]:
        numbers, scales = fp8_of(weight, (32, 16))
        return {name: numbers, f"{name}_scale_inv": scales}

    whole = original(tmp_path_factory.mktemp("whole"), "qwen3_moe")
    folder = tmp_path_factory.mktemp("fp8")
    return quantised(whole, folder, blocks_of, fp8_section((32, 16)))


@pytest.fixture(scope="module")
def cast(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Stored in bfloat16; it is computed with in float32."""
    folder = tmp_path_factory.mktemp("bf16")
    return make_checkpoint(folder, "tiny", dtype="bfloat16", shards_of="100KB")


def outputs(folder: Path, **values: Any) -> tuple[torch.Tensor, Any]:
    policy = Policy(device_memory="160KiB", resident_below=1, **values)
    with penstock.load(folder, policy) as model, torch.inference_mode():
        model(IDS)
        logits = model(IDS).logits
        return logits, penstock.statistics(model)


@pytest.mark.slow
@pytest.mark.parametrize("tier", TIERS)
@pytest.mark.parametrize("kind", ["fp8", "cast"])
def test_the_bits_are_the_same_and_links_carry_less(
    kind: str, tier: str, request: pytest.FixtureRequest
) -> None:
    folder = request.getfixturevalue(kind)
    dtype = {"dtype": "float32"}
    wanted, _ = outputs(folder, **dtype)
    read = {}
    for kept in ("stored", "decoded"):
        found, statistics = outputs(folder, weights_kept=kept, **dtype, **TIERS[tier])
        assert same_bits(found, wanted), kept
        read[kept] = statistics.bytes_read
        assert sum(read[kept].values()) > 0
    if tier == "peer":
        assert read["stored"]["peer"] < 0.6 * read["decoded"]["peer"]


def test_by_default_they_are_stored_where_not_all_fit_decoded(fp8: Path) -> None:
    for memory, are_images in (("10MiB", False), ("90KiB", True), (None, False)):
        policy = Policy(device_memory="160KiB", resident_below=1, host_memory=memory)
        with penstock.load(fp8, policy) as model:
            images = engine_of(model).arrangement.images
            assert (images is not None) == are_images


ROOMY = {
    name: {**values, "host_memory": "1MiB", "placement": {"layers.0": "disk"}}
    if "host_memory" in values
    else values
    for name, values in TIERS.items()
}
"""With memory for what an update decodes."""


@pytest.mark.parametrize("tier", TIERS)
def test_new_values_are_those_of_the_next_forward(tier: str, fp8: Path) -> None:
    """Whether they replace quantised weights or others, and again."""
    values: dict[str, Any] = {"weights_kept": "stored", **ROOMY[tier]}
    policy = Policy(device_memory="160KiB", resident_below=1, **values)
    with penstock.load(fp8, policy) as model, torch.inference_mode():
        before = model(IDS).logits
        state = {
            name: torch.randn(parameter.shape, dtype=parameter.dtype)
            for name, parameter in model.named_parameters()
            if "down_proj" in name or "norm" in name
        }
        assert len(state) > 4
        old = dequantised(fp8).state_dict()
        for _ in range(2):
            penstock.update(model, state)
            changed = model(IDS).logits
            assert not torch.equal(changed, before)
        with penstock.load(fp8, Policy(device_memory="1MiB")) as other:
            penstock.update(other, state)
            assert same_bits(other(IDS).logits, changed)
        penstock.update(model, {name: old[name] for name in state})
        assert same_bits(model(IDS).logits, before)


@pytest.mark.parametrize(
    ("key", "values"),
    [
        ("host_memory", TIERS["some on the host"]),
        ("host_memory", TIERS["links"]),
        (r"peer \(cpu\)", {"peer": {"cpu": "90KiB"}}),
    ],
)
def test_new_values_that_outgrow_the_memory_of_a_tier_are_refused(
    key: str, values: dict[str, Any], fp8: Path
) -> None:
    """They are not in fewer bits. And nothing has changed."""
    policy = Policy(
        device_memory="160KiB", resident_below=1, weights_kept="stored", **values
    )
    with penstock.load(fp8, policy) as model, torch.inference_mode():
        before = model(IDS).logits
        new = {
            name: torch.randn(parameter.shape, dtype=parameter.dtype)
            for name, parameter in model.named_parameters()
            if "down_proj" in name
        }
        for _ in range(2):
            with pytest.raises(UsageError, match=rf"{key} has .*: set weights_kept"):
                penstock.update(model, new)
            assert same_bits(model(IDS).logits, before)
    decoded = policy.model_copy(update={"weights_kept": "decoded"})
    with penstock.load(fp8, decoded) as model, torch.inference_mode():
        penstock.update(model, new)
        changed = model(IDS).logits
    with penstock.load(fp8, Policy(device_memory="1MiB")) as other:
        penstock.update(other, new)
        assert same_bits(other(IDS).logits, changed)


@pytest.mark.parametrize("tier", ["disk", "peer"])
def test_new_values_that_staging_memory_does_not_hold_are_refused(
    tier: str, fp8: Path
) -> None:
    """And nothing has changed."""
    tiers: dict[str, dict[str, Any]] = {
        "disk": {
            "host_memory": "90KiB",
            "placement": {"layers": "disk"},
            "links": {"disk": {"bandwidth": "1GB"}},
        },
        "peer": {"peer": {"cpu": "1MiB"}},
    }
    values = {**tiers[tier], "weights_kept": "stored", "staging_memory": "4KiB"}
    policy = Policy(device_memory="160KiB", resident_below=1, **values)
    with penstock.load(fp8, policy) as model, torch.inference_mode():
        before = model(IDS).logits
        name = "model.layers.1.self_attn.q_proj.weight"
        new = torch.randn(model.get_parameter(name).shape, dtype=torch.bfloat16)
        with pytest.raises(UsageError, match=r"staging_memory has .*: raise it to"):
            penstock.update(model, {name: new})
        assert same_bits(model(IDS).logits, before)
        small = torch.full((64,), 2.0, dtype=torch.bfloat16)
        penstock.update(model, {"model.norm.weight": small})
        assert not same_bits(model(IDS).logits, before)

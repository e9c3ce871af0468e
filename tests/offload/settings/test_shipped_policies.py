"""The policies that come with Penstock: they load, they run, and what is said of their
keys is what the keys mean."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM

import penstock
from checkpoint import make_checkpoint
from penstock import Policy
from penstock.offload.settings.contradictions import without_effect
from penstock.offload.settings.extends import SHIPPED, shipped
from penstock.offload.settings.installed import Installed, over_budget
from penstock.offload.settings.reference import (
    policy_schema,
    policy_text,
    reference_text,
)

pytestmark = pytest.mark.usefixtures("no_leaks")

NAMES = shipped()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    found = tmp_path_factory.mktemp("tiny") / "model"
    make_checkpoint(found, "tiny", dtype="float32")
    return found


def on_this_computer(policy: Policy, model_bytes: int) -> list[str]:
    """Settings that run `policy` on a CPU, with a model of so many bytes: what it has
    in gigabytes it has in parts of the model, another GPU is memory of the host."""
    third = model_bytes // 3
    found = {
        "device": "cpu",
        "device_memory": 2 * third,
        "gather_rows": 4096,
        "resident_below": 512,
    }
    if policy.memory != "auto":
        found["memory"] = "auto"  # this process has tests, too
    if policy.host_memory is not None:
        found["host_memory"] = third
    if policy.peer:
        found["peer"] = json.dumps({"cpu": third})
    for name in ("staging_memory", "pinned_memory", "activation_memory"):
        if getattr(policy, name) != "auto":
            found[name] = 64 << 20
    if policy.kv.limits:
        found["kv.limits"] = json.dumps(dict.fromkeys(policy.kv.limits, "64MiB"))
    if policy.kv.staging_memory != "auto":
        found["kv.staging_memory"] = "64KiB"
    return [f"{key}={value}" for key, value in found.items()]


def test_there_is_one_for_each_kind_of_machine() -> None:
    assert len(NAMES) >= 9
    assert {"base", "gpu", "laptop-16gb-ram-nvme", "8x-h100-nvlink"} <= set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_a_shipped_policy_says_what_it_is_for_and_only_what_is_known(name: str) -> None:
    path = SHIPPED / f"{name}.yaml"
    first, second, *rest = path.read_text().splitlines()
    assert first == "# yaml-language-server: $schema=policy.schema.json"
    assert second.startswith("# ")
    assert max(map(len, [second, *rest])) <= 88
    assert Policy.from_yaml(name) == Policy.from_yaml(path)
    values: Mapping[str, Any] = yaml.safe_load(path.read_text())
    assert set(values) <= set(policy_schema()["properties"])


GIB, GB = 1 << 30, 10**9
MACHINES = {  # what their names and second lines say, less what a system keeps
    "2x-rtx4090-pcie4": (128 * GB, 23 * GIB),
    "8x-h100-nvlink": (1000 * GB, 79 * GIB),
    "a6000-48gb": (128 * GB, 47 * GIB),
    "cpu-2gb-7b": (2 * GB, 0),
    "h100-80gb-pcie5": (256 * GB, 79 * GIB),
    "laptop-16gb-ram-nvme": (16 * GB, 0),
    "t4-16gb": (32 * GB, 14 * GIB),
}


@pytest.mark.parametrize("name", NAMES)
def test_a_shipped_policy_fits_the_machine_that_it_is_named_after(name: str) -> None:
    if name in ("base", "gpu"):
        assert name not in MACHINES
        return
    host_bytes, gpu_bytes = MACHINES[name]
    machine = Installed(
        host_bytes=host_bytes * 9 // 10,
        disk_bytes=4000 * GB,
        gpu_bytes={f"cuda:{number}": gpu_bytes for number in range(8)},
    )
    policy = Policy.from_yaml(name)
    assert over_budget(policy, machine) == []
    less = Installed(host_bytes=1, disk_bytes=1, gpu_bytes={"cuda:0": 1})
    assert over_budget(policy, less) != []
    assert without_effect(policy) == []


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.slow
def test_a_shipped_policy_runs_and_gives_the_resident_models_results(
    name: str, folder: Path
) -> None:
    """On a CPU, scaled down."""
    asked = Policy.from_yaml(name)
    nbytes = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    policy = Policy.from_yaml(name, on_this_computer(asked, nbytes))
    dtype = torch.float32 if policy.dtype == "auto" else getattr(torch, policy.dtype)
    resident: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    ids = torch.arange(5, 29).reshape(2, 12)
    options = {"max_new_tokens": 3, "do_sample": False, "pad_token_id": 0}
    with torch.inference_mode():
        logits = resident(ids).logits
        tokens = resident.generate(ids, **options)
    with penstock.load(folder, policy) as model, torch.inference_mode():
        assert torch.equal(model(ids).logits, logits)
        with penstock.sweep(model) as sweep:
            for found in sweep.map(lambda i: model.generate(i, **options), [ids, ids]):
                assert torch.equal(found, tokens)
        held = penstock.statistics(model).bytes_by_tier
        assert bool(held["host"]) == (asked.host_memory is not None)
        assert bool(held["peer"]) == bool(asked.peer)
        assert held["disk"] > 0


@pytest.mark.parametrize("name", NAMES)
def test_a_policy_as_text_makes_the_same_policy(name: str, tmp_path: Path) -> None:
    settings = ["tokens_in_flight=100", "micro_batch_tokens=auto"]
    policy = Policy.from_yaml(name, settings)
    path = tmp_path / "policy.yaml"
    path.write_text(policy_text(policy))
    assert Policy.from_yaml(path) == policy


def test_what_stands_beside_the_policies_is_up_to_date() -> None:
    """Else: penstock policy --reference, and --schema, write them anew."""
    schema = json.dumps(policy_schema(), indent=2) + "\n"
    assert (SHIPPED / "policy.schema.json").read_text() == schema
    assert (SHIPPED / "README.md").read_text() == reference_text()


def test_the_reference_names_every_key_and_its_default() -> None:
    text = reference_text()
    for name in (*Policy.model_fields, "threads", "limits", "latency", "extends"):
        assert f"**`{name}`**" in text
    assert "(size; default `64MiB`)" in text
    assert "(0 to 8 or `auto`; default `2`)" in text
    assert "(`auto`, `on` or `off`; default `auto`)" in text


def test_a_count_left_open_follows_from_the_one_that_was_said() -> None:
    assert Policy(tokens_in_flight=100).micro_batch_tokens == 100
    assert Policy(micro_batch_tokens=5000).tokens_in_flight == 5000
    for in_flight, each in ((3, 3), (16, 8), (64, 16), (100, 25), (999, 32)):
        assert Policy(sequences_in_flight=in_flight).micro_batch_sequences == each
    said = Policy(sequences_in_flight=64, micro_batch_sequences=64)
    assert said.micro_batch_sequences == 64
    assert Policy(micro_batch_sequences=300).sequences_in_flight == 300
    assert Policy(tokens_in_flight=9000).micro_batch_tokens == 512
    assert Policy(tokens_in_flight=100).model_fields_set == {"tokens_in_flight"}

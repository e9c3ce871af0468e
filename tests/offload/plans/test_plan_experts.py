"""Plans say which experts the CPU computes beside a GPU, and jobs take the number."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from penstock.offload.jobs.choosing import kept_of, left_open, restored
from penstock.offload.machines.machine import Machine
from penstock.offload.plans.plan import Plan, make_plan
from penstock.offload.plans.planned import Workload
from penstock.offload.policy import Policy
from penstock.offload.tasks.generate_task import Generate

QWEN = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "model_type": "qwen3_moe",
    "hidden_size": 1024,
    "intermediate_size": 2048,
    "moe_intermediate_size": 2048,
    "num_hidden_layers": 4,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "head_dim": 64,
    "num_experts": 16,
    "num_experts_per_tok": 2,
    "vocab_size": 4096,
    "dtype": "bfloat16",
}
HOST: dict[str, Any] = {"bfloat16": {1: 2e11, 256: 2e12}}


def machine(**values: Any) -> Machine:
    found: dict[str, Any] = {
        "name": "a GPU",
        "source": "a test",
        "device": "cuda",
        "device_memory": "1GiB",
        "host_memory": "64GiB",
        "host_bandwidth": "200GB",
        "matmul": {"bfloat16": {1: 1e14}},
        "disk": {"bandwidth": {"threads": "1GB"}},
        "copies": {"pinned_to_device": "25GB", "pinned_to_host": "25GB"},
        "host_matmul": HOST,
    }
    return Machine(**{**found, **values})


def plan(folder: Path, found: Machine, **values: Any) -> Plan:
    (folder / "config.json").write_text(json.dumps(QWEN))
    sizes = {"device_memory": "300MiB", "host_memory": "4GiB", "device": "cuda:0"}
    policy = Policy(**{**sizes, "experts": "host", **values})
    return make_plan(folder, policy, found, Workload(Generate(max_new_tokens=8)))


def test_the_number_comes_from_the_machine(tmp_path: Path) -> None:
    made = plan(tmp_path, machine())
    num = made.policy.experts
    assert isinstance(num, int)
    assert 10 < num < 80
    assert yaml.safe_load(made.to_yaml())["experts"] == num
    (says,) = (x for x in made.sentences if x.startswith("experts with"))
    assert says.startswith(f"experts with fewer than {num} tokens are computed on the")
    faster = {"pinned_to_device": "50GB", "pinned_to_host": "50GB"}
    fewer = plan(tmp_path, machine(copies=faster)).policy.experts
    assert isinstance(fewer, int)
    assert fewer < num


@pytest.mark.parametrize(
    ("found", "values", "words"),
    [
        ({"host_matmul": {}}, {}, "'a GPU' has no host_matmul rates for bfloat16"),
        ({"host_bandwidth": "10GB"}, {}, "an expert takes"),
        ({"device_memory": "4GiB"}, {"device_memory": "2GiB"}, "as they are chosen"),
    ],
)
def test_where_all_are_computed_on_the_device_a_plan_says_why(
    tmp_path: Path, found: dict[str, Any], values: dict[str, Any], words: str
) -> None:
    made = plan(tmp_path, machine(**found), **values)
    assert made.policy.experts == "device"
    assert any(words in sentence for sentence in made.sentences)


def test_what_the_user_set_stays(tmp_path: Path) -> None:
    assert plan(tmp_path, machine(), experts=7).policy.experts == 7
    silent = plan(tmp_path, machine(), experts="device")
    assert silent.policy.experts == "device"
    assert not any("expert" in says for says in silent.sentences[:-1])


def test_a_job_goes_on_with_its_number() -> None:
    asked, chosen = Policy(experts="host"), Policy(experts=12)
    kept = kept_of(asked, chosen)
    assert kept["experts"] == 12
    assert restored(asked, kept).experts == 12
    for fixed in (Policy(), Policy(experts=3), Policy(experts="device")):
        assert "experts" not in left_open(fixed)

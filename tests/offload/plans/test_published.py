"""Plans of published models by their config.json alone."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
from giants import NAMES, published, write

from penstock.io.errors import CheckpointError, DoesNotFitError, UsageError
from penstock.offload.machines.machine import Machine, find_machine
from penstock.offload.plans.plan import Plan, make_plan
from penstock.offload.plans.planned import Workload
from penstock.offload.policy import Policy
from penstock.offload.tasks.generate_task import Generate
from penstock.offload.tasks.score_task import Score
from penstock.offload.weights import hf
from shares import shared

BILLIONS = {
    "bloom-176b": 176.2,
    "command-r-plus": 103.8,
    "deepseek-r1": 671.0,
    "deepseek-v3": 671.0,
    "deepseek-v3.2": 671.9,
    "falcon-180b": 179.5,
    "glm-4.5": 352.8,
    "glm-5": 744.0,
    "gpt-oss-120b": 116.8,
    "kimi-k2": 1026.4,
    "kimi-k2.5": 1026.9,
    "llama-3.1-405b": 405.9,
    "llama-4-maverick": 400.7,
    "minimax-m1-hf": 456.1,
    "minimax-m1-official": 456.1,
    "minimax-m2.5": 228.7,
    "mistral-large-2": 122.6,
    "mixtral-8x22b": 140.6,
    "opt-175b": 174.6,
    "qwen2.5-vl-72b": 73.4,
    "qwen3-235b": 235.1,
    "qwen3-coder-480b": 480.2,
    "qwen3-next-80b": 79.7,
    "qwen3-vl-235b": 235.7,
    "qwen3.5-397b": 396.8,
}
"""Billions of parameters, as published, without the layers that predict several tokens
(MTP), which transformers does not build."""
GIGABYTES = {
    "deepseek-r1": 673.2,
    "deepseek-v3.2": 674.0,
    "deepseek-v3": 673.2,
    "gpt-oss-120b": 65.2,
    "kimi-k2": 1029.2,
    "kimi-k2.5": 595.1,
    "minimax-m2.5": 230.0,
}
"""10**9 bytes of the files of quantised ones, without MTP."""
LATENT_BYTES = 61 * (512 + 64) * 2
LARGE = ("deepseek-v3", "kimi-k2", "llama-4-maverick", "gpt-oss-120b")
EACH_TIME = (("deepseek-v3", "score"), ("gpt-oss-120b", "generate"))
WORK = {"score": Workload(Score(), 128), "generate": Workload(Generate(64), 128)}


@pytest.mark.parametrize(
    "name", shared(NAMES, lambda _, name: name in GIGABYTES or name == "glm-4.5")
)
def test_parameters_and_bytes_are_those_that_are_published(
    name: str, tmp_path: Path
) -> None:
    made = hf.imagine(write(tmp_path, published(name)), "auto")
    recipes = made.recipes.values()
    parameters = sum(math.prod(recipe.shape) for recipe in recipes)
    assert parameters / 1e9 == pytest.approx(BILLIONS[name], rel=0.005)
    stored = sum(recipe.stored_bytes for recipe in recipes) / 1e9
    assert stored == pytest.approx(GIGABYTES.get(name, 2 * parameters / 1e9), rel=0.01)


def planned(folder: Path, name: str, machine: str, work: str) -> Plan:
    found = find_machine(machine)
    assert found is not None
    return make_plan(write(folder, published(name)), Policy(), found, WORK[work])


def check_memory(made: Plan) -> None:
    """That keys and values are where the machine has room for them."""
    machine, need, policy = made.machine, made.choice.need, made.policy
    assert machine.device_memory is not None
    assert machine.disk is not None
    assert machine.disk.free is not None
    room = {
        "device": machine.device_memory,
        "host": machine.host_memory,
        "disk": machine.disk.free,
    }
    assert isinstance(policy.device_memory, int)
    taken = {
        "device": policy.device_memory + need.activations + need.staging + need.states,
        "host": (policy.host_memory or 0) + need.waiting + need.pending,
        "disk": 0,
    }
    taken[policy.kv.tier if need.kv else "disk"] += need.kv
    for tier, nbytes in taken.items():
        assert nbytes <= room[tier], tier


@pytest.mark.parametrize(
    ("name", "work"),
    shared(
        [(name, work) for name in LARGE for work in WORK],
        lambda _, case: (
            case in (("deepseek-v3", "score"), ("gpt-oss-120b", "generate"))
        ),
    ),
)
def test_the_largest_models_run_on_a_large_machine(
    name: str, work: str, tmp_path: Path
) -> None:
    made = planned(tmp_path, name, "h200", work)
    check_memory(made)
    assert made.choice.rate > 100
    if work == "generate" and name in ("deepseek-v3", "kimi-k2"):
        num = made.policy.sequences_in_flight
        assert made.choice.need.kv == num * (128 + 64) * LATENT_BYTES
    if (name, work) == ("deepseek-v3", "score"):
        assert made.choice.rate > 9000
        assert made.policy.micro_batch_tokens > 2048


@pytest.mark.whole
@pytest.mark.parametrize("name", LARGE)
def test_a_small_device_runs_them_or_says_what_would_do(
    name: str, tmp_path: Path
) -> None:
    refusal = ""
    try:
        made = planned(tmp_path, name, "2x-rtx-4090-pcie4", "score")
    except DoesNotFitError as error:
        refusal = str(error)
    if refusal:
        assert "its largest part and what is always needed take" in refusal
        assert "a device with" in refusal
        return
    check_memory(made)
    binds = made.choice.prediction.binds
    assert made.sentences[0].startswith(
        f"{binds.replace('compute', 'computing')} binds"
    )


@pytest.mark.slow
def test_experts_that_all_compute_are_planned_one_by_one(tmp_path: Path) -> None:
    """A layer of Maverick takes 31 GiB. Each token is computed by all its experts."""
    folder = write(tmp_path, published("llama-4-maverick"))
    machine = find_machine("a6000-pcie4")
    assert machine is not None
    policy = Policy(device_memory="20GiB", host_memory="64GiB")
    made = make_plan(folder, policy, machine, WORK["score"])
    assert made.choice.prediction.binds == "compute"
    with pytest.raises(DoesNotFitError) as refused:
        make_plan(folder, Policy(device_memory="256MiB"), machine, WORK["score"])
    (least,) = re.findall(r"at least (\d+) MiB, or to auto", str(refused.value))
    assert int(least) < 4 << 10
    enough = Policy(device_memory=f"{least}MiB")
    assert make_plan(folder, enough, machine, WORK["score"]).choice.rate > 0


def with_disk(free: str | None) -> Machine:
    found = find_machine("h200")
    assert found is not None
    assert found.disk is not None
    values = found.model_dump()
    values["disk"] = {"bandwidth": found.disk.bandwidth, "free": free}
    return Machine(**values)


LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 8,
    "num_attention_heads": 32,
    "vocab_size": 32000,
    "dtype": "bfloat16",
}
LONG = Workload(Generate(4096), 28672)
MANY = Policy(sequences_in_flight=512)


def test_keys_and_values_that_have_no_place_are_refused(tmp_path: Path) -> None:
    """2 TiB of them: more than the host has, and than the drive, but for one."""
    folder = write(tmp_path, LLAMA)
    with pytest.raises(DoesNotFitError, match="nor the drive") as caught:
        make_plan(folder, MANY, with_disk("1TB"), LONG)
    assert "keys and values of 512 sequences take 2.0 TiB" in str(caught.value)
    fits = make_plan(folder, MANY, with_disk("4TB"), LONG)
    assert fits.policy.kv.tier == "disk"
    assert any("(3.6 TiB are free)" in sentence for sentence in fits.sentences)
    unknown = make_plan(folder, MANY, with_disk(None), LONG)
    assert unknown.policy.kv.tier == "disk"
    assert any("whose room is not known" in said for said in unknown.sentences)


def test_windows_take_no_more_than_they_keep(tmp_path: Path) -> None:
    """A store has room for twice the window."""
    kind = {"architectures": ["MistralForCausalLM"], "model_type": "mistral"}
    folder = write(tmp_path, {**LLAMA, **kind, "sliding_window": 512})
    need = make_plan(folder, MANY, with_disk("4TB"), LONG).choice.need
    assert need.kv == 512 * 2 * 512 * 8 * 2 * 1024 * 2


def test_a_name_of_their_own_is_known_and_their_code_is_not_run(
    tmp_path: Path,
) -> None:
    own, code = published("minimax-m1-official"), tmp_path / "modeling_minimax_m1.py"
    write(tmp_path, own)
    code.write_text("raise SystemExit('this code ran')")
    (tmp_path / "configuration_minimax_m1.py").write_text(code.read_text())
    skeleton = hf.imagine(tmp_path, "auto")
    made = skeleton.model
    assert type(made).__name__ == "MiniMaxForCausalLM"
    assert "names MiniMaxM1ForCausalLM" in skeleton.notes[0]
    assert not hasattr(made.config, "auto_map")
    written: dict[str, Any] = published("minimax-m1-hf")
    for key in ("layer_types", "mlp_alpha_factor", "full_attn_alpha_factor"):
        assert getattr(made.config, key) == written[key]


def test_a_class_that_is_spelled_otherwise_is_the_one_of_its_type(
    tmp_path: Path,
) -> None:
    values = {**LLAMA, "num_hidden_layers": 1, "architectures": ["LLaMAForCausalLM"]}
    made = hf.imagine(write(tmp_path, values), "auto")
    assert type(made.model).__name__ == "LlamaForCausalLM"
    assert "names LLaMAForCausalLM" in made.notes[0]
    values["architectures"] = ["OwnForCausalLM"]
    with pytest.raises(UsageError, match="names the architectures"):
        hf.imagine(write(tmp_path, values), "auto")
    values["auto_map"] = {"AutoModelForCausalLM": "modeling_own.OwnForCausalLM"}
    (tmp_path / "config.json").write_text(json.dumps(values))
    with pytest.raises(CheckpointError, match="is not run"):
        hf.imagine(tmp_path, "auto")

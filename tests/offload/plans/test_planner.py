"""Plans: what is chosen, what is kept, what is refused, from config.json alone."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

import penstock
from checkpoint import make_checkpoint
from penstock.io.errors import (
    CheckpointError,
    DoesNotFitError,
    PolicyError,
    UsageError,
)
from penstock.offload.cli import app
from penstock.offload.machines.machine import Machine, find_machine, own_machine_path
from penstock.offload.plans.forecast import generating_of
from penstock.offload.plans.pareto import frontier
from penstock.offload.plans.plan import Plan, make_plan
from penstock.offload.plans.planned import Workload
from penstock.offload.policy import Policy
from penstock.offload.tasks.embed_task import Embed
from penstock.offload.tasks.generate_task import Generate
from penstock.offload.tasks.score_task import Score
from penstock.offload.weights.blueprint import blueprint
from penstock.scheduler.cost.site_loads import runs

LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 1024,
    "intermediate_size": 2816,
    "num_hidden_layers": 6,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "vocab_size": 16000,
    "max_position_embeddings": 2048,
    "dtype": "bfloat16",
}


def machine_of(*, disk: str = "1GB", memory: str = "8GiB") -> Machine:
    return Machine(
        name="small",
        source="a test",
        host_memory=memory,
        host_bandwidth="10GB",
        matmul={
            "float32": {1: 2e9, 512: 2e11},
            "bfloat16": {1: 2e9, 512: 2.5e10},
        },
        disk={"bandwidth": {"threads": disk, "libaio": disk}},
    )


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    folder = tmp_path / "llama"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(LLAMA))
    return folder


def plan(
    folder: Path, machine: Machine, workload: Workload | None = None, **settings: object
) -> Plan:
    return make_plan(folder, Policy(**settings), machine, workload or Workload())


def test_a_config_alone_has_the_recipes_of_the_checkpoint(tmp_path: Path) -> None:
    made = make_checkpoint(tmp_path / "tiny", "tiny")
    bare = tmp_path / "bare"
    bare.mkdir()
    (bare / "config.json").write_text((made / "config.json").read_text())
    (whole, there), (imagined, not_there) = (
        blueprint(folder, "float32") for folder in (made, bare)
    )
    assert (there, not_there) == (True, False)
    found, expected = (
        {name: (r.shape, r.dtype, r.stored_bytes) for name, r in made.recipes.items()}
        for made in (imagined, whole)
    )
    assert found == expected


def test_a_slow_disk_takes_more_tokens_in_flight_or_more_memory(llama: Path) -> None:
    quick = plan(llama, machine_of(disk="4GB"), dtype="float32").policy
    slow = plan(llama, machine_of(disk="20MB"), dtype="float32").policy
    assert isinstance(slow.device_memory, int)
    assert isinstance(quick.device_memory, int)
    assert slow.tokens_in_flight >= quick.tokens_in_flight
    more = slow.tokens_in_flight > quick.tokens_in_flight
    assert more or slow.device_memory > quick.device_memory


def test_what_the_user_set_is_kept(llama: Path) -> None:
    found = plan(
        llama,
        machine_of(),
        dtype="float32",
        tokens_in_flight=512,
        micro_batch_tokens=128,
        device_memory="128MiB",
    )
    policy = found.policy
    assert (policy.tokens_in_flight, policy.micro_batch_tokens) == (512, 128)
    assert policy.device_memory == 128 << 20
    assert "kept as you set them" in found.sentences[-1]


def test_a_plan_says_what_binds_and_what_would_hide_it(llama: Path) -> None:
    bound = plan(
        llama,
        machine_of(disk="50MB"),
        dtype="float32",
        tokens_in_flight=128,
        micro_batch_tokens=128,
        device_memory="128MiB",
    )
    assert bound.choice.prediction.binds == "disk"
    assert bound.sentences[0].startswith("disk binds: 0.05 GB/s; about ")
    asked = "would hide it; you set tokens_in_flight to 128"
    assert asked in bound.sentences[0]
    slow = machine_of(disk="100KB")
    tight = plan(llama, slow, dtype="float32", device_memory="128MiB")
    assert "would hide it; you have memory for" in tight.sentences[0]
    policy = Policy(dtype="float32", device_memory="128MiB")
    soon = make_plan(llama, policy, slow, Workload(), "latency")
    assert "which would take longer for each" in soon.sentences[0]
    free = plan(llama, machine_of(disk="4GB"), dtype="float32")
    assert free.sentences[0].startswith("computing binds")


def test_a_faster_dtype_is_taken_where_it_is_left_open(llama: Path) -> None:
    found = plan(llama, machine_of())
    assert (found.dtype, found.policy.dtype) == ("float32", "float32")
    slow = plan(llama, machine_of(), dtype="bfloat16")
    assert found.choice.rate > 2 * slow.choice.rate
    sentence = "computing in float32 (8.0x faster here than bfloat16)"
    assert sentence in found.sentences
    assert not any("kept as you set" in sentence for sentence in found.sentences)


def test_a_dtype_that_the_user_set_stays_and_a_faster_one_is_advised(
    llama: Path,
) -> None:
    found = plan(llama, machine_of(), dtype="bfloat16")
    assert found.policy.dtype == "bfloat16"
    assert any(s.startswith("dtype=float32 would be") for s in found.sentences)


def test_a_dtype_that_does_not_fit_is_neither_taken_nor_advised(llama: Path) -> None:
    """The largest part is the head: 31 MiB, or 62 in float32."""
    tight: dict[str, Any] = {"device_memory": "58MiB", "micro_batch_tokens": 128}
    found = plan(llama, machine_of(), **tight)
    assert found.dtype == "bfloat16"
    assert "float32 is 5.0x faster, but does not fit" in found.sentences[-2]
    asked = plan(llama, machine_of(), dtype="bfloat16", **tight)
    assert not any("would be" in sentence for sentence in asked.sentences)


def test_products_of_few_rows_stay_in_the_dtype_of_fewer_bytes(llama: Path) -> None:
    """A row at a time is bound by the bytes of weights, which casting doubles."""
    machine = machine_of()
    few = {"float32": {1: 2e9, 512: 2e11}, "bfloat16": {1: 4e9, 8: 3e10, 512: 3.2e10}}
    narrow = machine.model_copy(update={"matmul": few})
    task = Workload(Generate(64), 1)
    flight = {"sequences_in_flight": 4, "micro_batch_sequences": 4}
    assert plan(llama, narrow, task, **flight).dtype == "bfloat16"
    assert plan(llama, narrow, Workload(Score(), 64)).dtype == "float32"


def test_no_dtype_of_fewer_bits_than_the_checkpoints_is_ever_taken(
    tmp_path: Path,
) -> None:
    (tmp_path / "config.json").write_text(json.dumps({**LLAMA, "dtype": "float32"}))
    amx = {"float32": {512: 1e11}, "bfloat16": {512: 2e12}}
    machine = machine_of().model_copy(update={"matmul": amx})
    found = plan(tmp_path, machine)
    assert (found.dtype, found.policy.dtype) == ("float32", "auto")


def test_completions_keep_keys_and_values_append_only(llama: Path) -> None:
    task = Workload(Generate(32), 64)
    found = plan(llama, machine_of(), task, dtype="float32")
    assert found.policy.kv.tier == "host"
    assert found.choice.prediction.output_tokens_per_second > 0
    assert found.policy.sequences_in_flight >= found.policy.micro_batch_sequences


def test_a_plan_has_the_parts_of_prompts_that_a_job_takes() -> None:
    """256 rows of 64 tokens: one pass, four, and whole prompts in smaller calls."""
    work = generating_of(Policy(micro_batch_sequences=8), 256, 64, 16, in_parts=True)
    assert (work.each, work.chunks) == (8, (64,))
    work = generating_of(Policy(), 256, 64, 16, in_parts=True)
    assert (work.each, work.chunks) == (32, (16,) * 4)
    work = generating_of(Policy(micro_batch_sequences=64), 256, 64, 16, in_parts=True)
    assert (work.each, work.chunks) == (64, (16,) * 4)
    whole = Policy(micro_batch_sequences=64, prompt_tokens="all")
    work = generating_of(whole, 256, 64, 16, in_parts=True)
    assert (work.each, work.chunks) == (8, (64,))
    assert generating_of(
        Policy(prompt_tokens=24), 256, 64, 16, in_parts=True
    ).chunks == (24, 24, 16)


def test_the_least_latency_has_one_micro_batch_in_flight(llama: Path) -> None:
    policy = Policy(dtype="float32")
    found = make_plan(llama, policy, machine_of(), Workload(), "latency").policy
    assert found.tokens_in_flight == found.micro_batch_tokens


def test_what_cannot_run_is_refused_with_what_would(llama: Path) -> None:
    with pytest.raises(DoesNotFitError, match=r"a device with [\d.]+ [MG]iB of memory"):
        plan(llama, machine_of(memory="700MiB"), dtype="float32")
    tpu = find_machine("tpu-v4-64")
    assert tpu is not None
    with pytest.raises(PolicyError, match="for the formulas alone"):
        plan(llama, tpu)


def test_a_working_set_that_does_not_do_is_named_with_one_that_does(
    llama: Path,
) -> None:
    for asked, words in (("1MiB", "at least"), ("1TiB", "at most")):
        with pytest.raises(DoesNotFitError, match=f"device_memory is 1.0 .*{words}"):
            plan(llama, machine_of(), dtype="float32", device_memory=asked)
    with pytest.raises(DoesNotFitError) as caught:
        plan(llama, machine_of(), dtype="float32", device_memory="1MiB")
    least = str(caught.value).partition("at least ")[2].partition(",")[0]
    found = plan(llama, machine_of(), dtype="float32", device_memory=least)
    assert found.choice.prediction.tokens_per_second > 0


@pytest.mark.parametrize("on_gpu", [False, True])
def test_host_memory_that_the_machine_has_not_is_named_with_what_does(
    llama: Path, *, on_gpu: bool
) -> None:
    gpu: dict[str, Any] = {
        "device": "cuda",
        "device_memory": "2GiB",
        "copies": {"pinned_to_device": "10GB", "pinned_to_host": "10GB"},
    }
    small = machine_of(memory="800MiB" if on_gpu else "1GiB")
    machine = Machine(**small.model_dump() | (gpu if on_gpu else {}))
    values: dict[str, Any] = {"dtype": "float32", "host_memory": "10TiB"}
    with pytest.raises(DoesNotFitError, match=r"host_memory is 10\.0 TiB") as caught:
        plan(llama, machine, **values)
    most = str(caught.value).partition("at most ")[2].partition(",")[0]
    found = plan(llama, machine, **{**values, "host_memory": most})
    assert found.choice.forecast.bytes_by_tier["host"] <= machine.host_memory


def test_host_memory_of_more_than_the_model_does_no_harm(llama: Path) -> None:
    found = plan(llama, machine_of(), dtype="float32", host_memory="10TiB")
    assert found.choice.forecast.bytes_by_tier["host"]


def test_a_micro_batch_of_more_than_is_tried_in_flight_is_planned_for(
    llama: Path,
) -> None:
    machine = machine_of(memory="900GiB")
    found = plan(llama, machine, micro_batch_tokens=1 << 20).policy
    assert found.micro_batch_tokens == found.tokens_in_flight == 1 << 20
    with pytest.raises(DoesNotFitError, match="what is in flight"):
        plan(llama, machine_of(), micro_batch_tokens=1 << 30)
    completions = Workload(Generate(8))
    plan(llama, machine, completions, micro_batch_sequences=1 << 14)


def test_weights_that_are_copied_to_a_gpu_do_not_stay_there(llama: Path) -> None:
    machine = find_machine("t4")
    assert machine is not None
    found = plan(llama, machine, dtype="float16", device_memory="128MiB")
    assert found.choice.forecast.bytes_by_tier["host"]
    assert found.sentences[0].startswith(("computing binds: weights", "host binds"))


@pytest.mark.parametrize("text", ["{", "[]", '{"model_type": "nosuch"}'])
def test_a_config_that_is_none_is_refused_in_one_line(
    tmp_path: Path, text: str
) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"config\.json") as caught:
        plan(tmp_path, machine_of())
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["h100-pcie5", "t4", "2x-rtx-4090-pcie4"])
def test_gpus_that_are_not_here_can_be_planned_for(llama: Path, name: str) -> None:
    machine = find_machine(name)
    assert machine is not None
    dtype = "float16" if name == "t4" else "bfloat16"
    found = plan(llama, machine, dtype=dtype)
    assert found.policy.device == "cuda"
    assert found.choice.prediction.tokens_per_second > 1000


def test_the_frontier_has_nobody_better_in_both() -> None:
    points = [(1.0, 5.0), (2.0, 4.0), (3.0, 9.0), (3.0, 8.0), (4.0, 9.0)]
    assert frontier(points) == [(1.0, 5.0), (3.0, 9.0)]


@pytest.fixture
def machine_file(tmp_path: Path) -> Path:
    path = tmp_path / "machine.yaml"
    path.write_text(machine_of().to_yaml())
    return path


def test_the_command_prints_tables_json_yaml_and_plots(
    llama: Path, machine_file: Path, tmp_path: Path
) -> None:
    pytest.importorskip("matplotlib")
    run = CliRunner().invoke
    common = ["plan", str(llama), "--machine", str(machine_file), "--set"]
    shown = run(app, [*common, "dtype=float32"])
    assert shown.exit_code == 0, shown.output
    assert "tokens/s" in shown.output
    plot = tmp_path / "pareto.svg"
    found = run(app, [*common, "dtype=float32", "--json", "--pareto", str(plot)])
    values = json.loads(found.output)
    assert values["binds"] == "compute"
    assert sum(values["bytes_by_tier"].values()) > 10**8
    assert plot.read_text().startswith("<?xml")
    text = run(app, [*common, "dtype=float32", "--yaml"]).output
    assert Policy(**yaml.safe_load(text)).dtype == "float32"


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--json", "--yaml"], "give one of them"),
        (["--pareto", "plot.pdf"], r"ends in \.png or \.svg"),
        (["--pareto", "no/such/plot.png"], "there is no folder no/such"),
    ],
)
def test_what_cannot_be_printed_is_refused_before_anything_is_planned(
    tmp_path: Path, machine_file: Path, options: list[str], words: str
) -> None:
    command = ["plan", str(tmp_path / "none"), "--machine", str(machine_file)]
    failed = CliRunner().invoke(app, [*command, *options])
    assert failed.stdout == ""
    assert re.search(words, str(failed.exception))


def test_without_a_machine_file_a_plan_is_made_of_quick_estimates(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[object] = []

    def estimated(dtypes: Iterable[str], files: object, io: object) -> Machine:
        asked.extend([sorted(dtypes), files])
        source = "quick estimate, measured in 0.9 s; `penstock machine` measures"
        update = {"source": source, "is_estimate": True}
        return machine_of().model_copy(update=update)

    monkeypatch.setattr("penstock.offload.plans.plan.estimated_machine", estimated)
    cache = f"io.cache={tmp_path / 'cache'}"
    done = CliRunner().invoke(app, ["plan", str(llama), "--set", cache])
    assert done.exit_code == 0
    assert asked == [["bfloat16", "float32"], {}]
    assert "(quick estimate, measured in 0.9 s" in " ".join(done.output.split())
    as_json = CliRunner().invoke(app, ["plan", str(llama), "--set", cache, "--json"])
    found = json.loads(as_json.output)
    assert (found["is_estimate"], found["dtype"]) == (True, "float32")
    assert "io.reader" not in found["policy"], "only one was tried"


def test_this_computer_has_what_its_cgroup_leaves(
    llama: Path, machine_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "penstock.offload.monitoring.memory.installed_bytes", lambda: 600 << 20
    )
    here = CliRunner().invoke(app, ["plan", str(llama)])
    assert isinstance(here.exception, DoesNotFitError)
    there = ["plan", str(llama), "--machine", str(machine_file)]
    assert CliRunner().invoke(app, there).exit_code == 0, "its file says what it has"


def test_a_gpu_is_not_estimated(llama: Path, tmp_path: Path) -> None:
    options = ["--set", f"io.cache={tmp_path}", "--set", "device=cuda"]
    failed = CliRunner().invoke(app, ["plan", str(llama), *options])
    assert "run penstock machine --device cuda" in str(failed.exception)


@pytest.mark.slow
def test_a_resolved_policy_runs_and_its_report_has_the_prediction(
    tmp_path: Path, machine_file: Path
) -> None:
    model = make_checkpoint(tmp_path / "tiny", "tiny")
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(f'{{"id": {i}, "text": "some words"}}\n' for i in range(5)))
    cache = tmp_path / "cache"
    run = CliRunner().invoke
    resolved = tmp_path / "policy.yaml"
    plan_it = ["plan", str(model), "--machine", str(machine_file), "--prompt", "8"]
    plan_it += ["--set", f"io.cache={cache}", "--yaml"]
    resolved.write_text(run(app, plan_it).output)
    score = ["score", str(model), str(rows), "-o", str(tmp_path / "out.jsonl")]
    score += ["--policy", str(resolved), "--report", str(tmp_path)]
    assert run(app, score).exit_code == 0
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["plan"]["predicted_by"].startswith("quick estimate")
    assert report["plan"]["predicted_tokens_per_second"] > 0
    own = own_machine_path(cache)
    own.parent.mkdir(exist_ok=True)
    own.write_text(machine_file.read_text())
    assert run(app, [*score, "--restart"]).exit_code == 0
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["plan"]["predicted_tokens_per_second"] > 0
    assert report["plan"]["predicted_bound_by"] in ("compute", "disk")
    assert report["plan"]["predicted_by"] == "a test"
    assert penstock.__version__


LONG = Workload(Generate(240), 16)


def test_keys_and_values_go_to_disk_where_memory_is_too_small(llama: Path) -> None:
    """12 KiB a token: 4,096 sequences have 12 GiB of them."""
    many = {"dtype": "float32", "sequences_in_flight": 4096}
    roomy = plan(llama, machine_of(memory="32GiB"), LONG, **many)
    assert roomy.policy.kv.tier == "host"
    small = plan(llama, machine_of(memory="3GiB"), LONG, **many)
    assert small.policy.kv.tier == "disk"
    need = small.choice.need
    assert need.kv == 4096 * 256 * 6 * 2 * 4 * 64 * 4
    assert isinstance(small.policy.device_memory, int)
    other = need.activations + need.staging + need.pending
    assert small.policy.device_memory + other <= 3 * 2**30 * 0.9
    assert need.staging > 0 < need.pending
    (said,) = [s for s in small.sentences if s.startswith("keys and values")]
    assert "4,096 sequences (12.0 GiB) go to disk" in said
    assert small.sentences[0].endswith("more sequences in flight would not hide it")
    assert small.choice.rate < roomy.choice.rate


def test_keys_and_values_have_all_that_is_left_in_their_tier(llama: Path) -> None:
    """Without a limit they would go on to disk at half of what is free."""
    found = plan(llama, machine_of(memory="4GiB"), LONG, dtype="float32")
    assert found.policy.kv.tier == "host"
    limit = found.policy.kv.limits["host"]
    assert limit >= found.choice.need.kv
    asked = {"kv": {"tier": "host", "limits": {"host": "1GiB"}}}
    kept = plan(llama, machine_of(memory="4GiB"), LONG, dtype="float32", **asked)
    assert kept.policy.kv.limits == {"host": 2**30}


def gpu_of(**values: object) -> Machine:
    """A laptop's, which computes faster than its memory grows."""
    return Machine(
        **{
            "name": "laptop",
            "source": "a test",
            "device": "cuda",
            "host_memory": "32GiB",
            "device_memory": "2GiB",
            "device_bandwidth": "200GB",
            "matmul": {"bfloat16": {1: 1e12, 512: 40e12}},
            "disk": {"bandwidth": {"threads": "3GB"}},
            "copies": {"pinned_to_device": "12GB", "pinned_to_host": "12GB"},
            **values,
        }
    )


def test_keys_and_values_of_a_small_gpu_stay_in_host_memory(llama: Path) -> None:
    """5 KiB a token in bfloat16: of 2,048 sequences 3 GiB, of 64 96 MiB."""
    many = plan(llama, gpu_of(), LONG, sequences_in_flight=2048)
    assert many.policy.kv.tier == "host"
    assert any("(3.0 GiB) stay in host memory" in s for s in many.sentences)
    few = plan(llama, gpu_of(), LONG, sequences_in_flight=64)
    assert few.policy.kv.tier == "device"
    assert not any("keys and values" in s for s in few.sentences)


def test_keys_and_values_that_no_memory_holds_are_never_planned_there(
    llama: Path,
) -> None:
    found = plan(llama, gpu_of(host_memory="3GiB"), LONG, sequences_in_flight=2048)
    assert found.policy.kv.tier == "disk"
    for choice in found.planner.choices():
        if choice.policy.kv.tier == "host":
            assert choice.need.kv < 3 * 2**30 * 0.9


@pytest.mark.slow
def test_activations_wait_in_host_memory_where_the_device_is_too_small(
    llama: Path,
) -> None:
    """A disk so slow that passes are worth their weights with 200,000 tokens only:
    1.2 GB of hidden states."""
    slow = gpu_of(disk={"bandwidth": {"threads": "30MB"}}, device_memory="700MiB")
    low: dict[str, Any] = {"host_memory": None, "device_memory": "128MiB"}
    found = plan(llama, slow, **low)
    assert found.policy.activations == "host"
    need = found.choice.need
    assert need.waiting == found.policy.tokens_in_flight * 1024 * 2 * 3
    assert need.activations + (128 << 20) < 0.9 * (700 << 20) < need.waiting
    assert any("(activations: host)" in sentence for sentence in found.sentences)
    stays = plan(llama, slow, activations="device", **low)
    assert stays.policy.tokens_in_flight < found.policy.tokens_in_flight
    assert stays.choice.rate < found.choice.rate
    assert plan(llama, gpu_of(), **low).policy.activations == "device"


BERT = {
    "architectures": ["BertForMaskedLM"],
    "model_type": "bert",
    "hidden_size": 256,
    "intermediate_size": 1024,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "vocab_size": 8000,
    "dtype": "float32",
}
T5 = {
    "architectures": ["T5ForConditionalGeneration"],
    "model_type": "t5",
    "d_model": 256,
    "d_ff": 1024,
    "num_layers": 4,
    "num_heads": 4,
    "d_kv": 64,
    "vocab_size": 8000,
    "dtype": "float32",
}
EMBEDS = Workload(Embed(), 64)


def ran(found: Plan) -> list[str]:
    """Names of the sites that a pass of the plan computes."""
    model = found.choice.forecast.model
    return [site.name for site in model.shape.sites if runs(site, model.settings)]


@pytest.mark.slow
@pytest.mark.parametrize("config", [BERT, T5], ids=["bert", "t5"])
def test_encoders_can_be_planned_for_by_their_config(
    config: dict[str, Any], tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config))
    found = plan(tmp_path, machine_of(), EMBEDS)
    names = ran(found)
    assert len([name for name in names if "layer" in name or "block" in name]) == 4
    assert not [n for n in names if "decoder" in n or "cls" in n or "lm_head" in n]
    assert found.to_json()["task"] == "embed"
    assert found.choice.prediction.tokens_per_second > 0


def test_embedding_leaves_the_head_out(llama: Path) -> None:
    policy = Policy(dtype="float32", tokens_in_flight=512, device_memory="200MiB")
    slow = machine_of(disk="10MB")
    scored, embedded = (
        make_plan(llama, policy, slow, task).choice
        for task in (Workload(Score(), 64), EMBEDS)
    )
    assert scored.forecast.shape == embedded.forecast.shape
    head = 16000 * 1024 * 2 / 10e6
    placed = dict(
        zip(
            (unit.name for unit in scored.forecast.shape.units),
            scored.forecast.model.settings.placement,
            strict=True,
        )
    )
    assert placed["lm_head"] == "disk"
    less = scored.prediction.pass_seconds - embedded.prediction.pass_seconds
    assert less == pytest.approx(head, rel=0.01)
    assert scored.need.activations - embedded.need.activations == 64 << 20


def test_a_task_that_is_not_the_models_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(BERT))
    with pytest.raises(UsageError, match="no causal language model"):
        plan(tmp_path, machine_of())
    with pytest.raises(UsageError, match="does not generate text"):
        plan(tmp_path, machine_of(), LONG)

"""What a job chooses of what its policy leaves open: said, kept, and gone on with."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from test_job import Watched, kill
from transformers import LlamaConfig

from checkpoint import config_values, make_checkpoint
from jobs import Killed
from penstock import Policy
from penstock.offload.jobs import choosing
from penstock.offload.jobs.choosing import (
    Chosen,
    kept_of,
    left_open,
    restored,
)
from penstock.offload.jobs.job import Job
from penstock.offload.jobs.kept import begun_as
from penstock.offload.jobs.manifest import FORMAT, Manifest
from penstock.offload.machines.machine import Machine, own_machine_path
from penstock.offload.plans.planned import Workload
from penstock.offload.tasks.score_task import Score

GIB = 1 << 30


def machine_of(**matmul: dict[int, float]) -> Machine:
    return Machine(
        name="small",
        source="a test",
        host_memory="8GiB",
        host_bandwidth="10GB",
        matmul=matmul,
        disk={"bandwidth": {"threads": "1GB"}},
    )


EMULATED = machine_of(float32={1: 2e9, 512: 2e11}, bfloat16={1: 2e9, 512: 4e10})
ABLE = machine_of(float32={1: 2e9, 512: 2e11}, bfloat16={1: 4e9, 512: 2e12})


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("models") / "tiny", "tiny")


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


def policy(cache: Path, machine: Machine, **settings: Any) -> Policy:
    """On a computer that was measured to be `machine`."""
    path = own_machine_path(cache)
    path.parent.mkdir(exist_ok=True)
    path.write_text(machine.to_yaml())
    return Policy(io={"cache": cache, "reader": "threads"}, **settings)


def job(folder: Path, tmp_path: Path, asked: Policy, **options: Any) -> Job:
    source = tmp_path / "in.jsonl"
    source.write_text("".join(f'{{"id": {n}, "text": "a b c"}}\n' for n in range(6)))
    return Job(Score(), folder, source, tmp_path / "out.jsonl", asked, **options)


def ran(job: Job) -> tuple[dict[str, Any], str]:
    """The report, and what was said."""
    console = Console(record=True, width=400, file=open("/dev/null", "w"))  # noqa: SIM115
    done = job.run(console)
    console.file.close()
    assert done.report is not None
    return done.report, console.export_text()


def test_the_first_line_and_the_report_say_what_was_chosen(
    folder: Path, tmp_path: Path, cache: Path
) -> None:
    report, said = ran(job(folder, tmp_path, policy(cache, EMULATED)))
    first = said.splitlines()[0]
    assert first.startswith("penstock: computing in float32 (")
    for part in ("5.0x", " of ", "tokens a pass", "predicted", "binds"):
        assert part in first
    assert report["dtype"] == "float32"
    assert report["plan"]["chosen"] in first
    assert report["plan"]["predicted_tokens_per_second"] > 0
    assert set(report["asked"]) == {"io"}
    assert report["policy"]["dtype"] == "float32"


def test_a_job_that_is_gone_on_with_keeps_what_it_began_with(
    folder: Path, tmp_path: Path, cache: Path
) -> None:
    """The computer seems to be another one when the job is run again."""

    def in_parts(**then: Any) -> Any:
        return Watched(Score(), num_rows=2, **then)

    asked = policy(cache, EMULATED)
    whole = replace(job(folder, tmp_path, asked), task=in_parts())
    whole = replace(whole, output=tmp_path / "whole.jsonl")
    ran(whole)
    begun = replace(
        whole, task=in_parts(at=3, then=kill), output=tmp_path / "out.jsonl"
    )
    with pytest.raises(Killed):
        begun.run(Console(quiet=True))
    made = begun_as(begun.output, "resume")
    assert made is not None
    assert made.chosen is not None
    assert made.chosen["dtype"] == "float32"
    able = policy(cache, ABLE)
    goes_on = replace(begun, policy=able, task=in_parts())
    report, said = ran(goes_on)
    assert (report["rows_before"], report["dtype"]) == (2, "float32")
    assert said.startswith("penstock: computing in float32 (as the job began)")
    assert begun.output.read_bytes() == whole.output.read_bytes()
    assert goes_on.run(Console(quiet=True)).report is None, "it is done"
    anew = replace(goes_on, mode="restart", task=Score())
    assert ran(anew)[0]["dtype"] == "bfloat16"


def test_what_is_kept_is_restored_unless_the_user_says_otherwise() -> None:
    asked = Policy(micro_batch_tokens=64)
    chosen = Policy(micro_batch_tokens=64, tokens_in_flight=512, dtype="float32")
    kept = kept_of(asked, chosen)
    assert "micro_batch_tokens" not in kept
    found = restored(asked, json.loads(json.dumps(kept)))
    assert (found.dtype, found.tokens_in_flight) == ("float32", 512)
    assert restored(Policy(dtype="bfloat16"), kept).dtype == "bfloat16"
    assert restored(asked, {}) == asked, "of a version that chose nothing"
    assert "dtype" in left_open(Policy(dtype="auto"))


def test_a_manifest_of_a_version_that_chose_nothing_can_be_read() -> None:
    values: dict[str, Any] = {
        name: {} for name in ("input", "model", "meaning", "rounding", "versions")
    }
    old = {**values, "cut": {}, "stamps": [], "retries": False, "format": FORMAT}
    assert Manifest.from_json(old).chosen is None


def test_the_line_says_where_the_size_of_memory_comes_from(
    folder: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = policy(cache, EMULATED, memory="3GiB")
    assert "3.0 GiB of memory (as you set it)" in choose(folder, asked).words
    free = choose(folder, policy(cache, EMULATED))
    assert "what is free" in free.words or "cgroup" in free.words
    monkeypatch.setattr(choosing, "installed_bytes", lambda: GIB)
    limited = choose(folder, policy(cache, EMULATED))
    assert "of the cgroup's limit of 1.0 GiB" in limited.words


def choose(folder: Path, asked: Policy) -> Chosen:
    return choosing.choose(folder, asked, Workload())


def test_a_memory_that_is_far_smaller_than_the_model_is_planned_for(
    tmp_path: Path, cache: Path
) -> None:
    LlamaConfig(**config_values("1.1b", "bfloat16")).save_pretrained(tmp_path)
    found = choose(tmp_path, policy(cache, EMULATED, memory="1GiB"))
    assert found.plan is not None, found.words
    assert found.policy.dtype == "float32"


def test_one_that_cannot_be_planned_is_left_to_whoever_loads_it(
    folder: Path, cache: Path
) -> None:
    """Loading the model tells more than a forecast of its memory."""
    small = policy(cache, EMULATED, memory="1MiB")
    found = choose(folder, small)
    assert (found.policy, found.plan) == (small, None)
    assert found.words.startswith("nothing is planned or predicted:")


def test_a_gpu_that_nobody_measured_is_not_planned_for(
    folder: Path, cache: Path
) -> None:
    asked = policy(cache, EMULATED, device="cuda")
    found = choosing.choose(folder, asked, Workload())
    assert found == Chosen(asked, note=found.note)
    assert "run penstock machine --device cuda" in found.words


def test_several_workers_share_a_dtype_and_each_its_part_of_memory(
    folder: Path, cache: Path
) -> None:
    found = choosing.choose(folder, policy(cache, EMULATED), Workload(), num=2)
    assert found.policy.dtype == "float32"
    assert found.policy.device_memory == "auto", "divided among them"


def test_advice_is_tried_in_the_dtype_and_memory_that_there_are(
    folder: Path, cache: Path
) -> None:
    asked = policy(cache, EMULATED)
    trial = choosing.choose(folder, asked, Workload()).trial(folder, asked)
    assert trial is not None
    now, narrow = trial({}), trial({"dtype": "bfloat16"})
    assert now is not None
    assert narrow is not None
    assert now.rate > narrow.rate
    assert trial({"device_memory": "100GiB"}) is None
    assert trial({"no_such_key": 1}) is None

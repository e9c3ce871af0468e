"""`penstock tune`: around a plan, with fake measurements and with real ones."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from checkpoint import make_checkpoint
from penstock.io.errors import (
    DoesNotFitError,
    InputError,
    OutputError,
    UsageError,
)
from penstock.offload.cli import app
from penstock.offload.machines.machine import Machine
from penstock.offload.plans.plan import make_plan
from penstock.offload.plans.planned import Workload
from penstock.offload.policy import Policy
from penstock.offload.tasks.classify_task import Classify
from penstock.offload.tasks.generate_task import Generate
from penstock.offload.tasks.registry import TASKS
from penstock.offload.tasks.score_task import Score
from penstock.offload.tasks.task import Task
from penstock.offload.tuning.log import SUFFIX, TuneLog
from penstock.offload.tuning.race import LAPS, Verdict
from penstock.offload.tuning.slices import (
    Slice,
    made_up,
    measured_rate,
    predicted_rate,
    sample_of,
)
from penstock.offload.tuning.tune import Tuning
from penstock.offload.tuning.tuned import tuned_yaml

Measure = Callable[[Path, Policy, Slice], float]

MACHINE = Machine(
    name="small",
    source="a test",
    host_memory="2GiB",
    host_bandwidth="10GB",
    matmul={"float32": {1: 2e9, 512: 2e11}},
    disk={"bandwidth": {"threads": "1GB", "aiofiles": "900MB"}},
)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("models") / "tiny", "tiny")


def tuning(model: Path, measure: Measure, workload: Workload | None = None) -> Tuning:
    policy = Policy(dtype="float32")
    plan = make_plan(model, policy, MACHINE, workload or Workload(Score(), 16))
    return Tuning(plan, made_up(Score(), 16), measure)


def by_micro_batch(model: Path, policy: Policy, work: Slice) -> float:
    """The smaller the faster; one of them does not fit."""
    if policy.tokens_in_flight > policy.micro_batch_tokens:
        raise DoesNotFitError("too much in flight")
    return 1e6 / policy.micro_batch_tokens


def finish(tuning: Tuning, log: TuneLog) -> Verdict:
    last = list(tuning.run(log))[-1]
    assert isinstance(last, Verdict)
    return last


@pytest.mark.slow
def test_the_fastest_policy_is_written_with_its_figures(
    tiny: Path, tmp_path: Path
) -> None:
    search = tuning(tiny, by_micro_batch)
    log = TuneLog(tmp_path / "tuned.yaml", search.job, restart=False)
    verdict = finish(search, log)
    path = tmp_path / "tuned.yaml"
    path.write_text(tuned_yaml(search, verdict, log.timings))
    start = search.plan.policy
    found = Policy.from_yaml(path)
    assert found.micro_batch_tokens == start.micro_batch_tokens // 2
    assert (found.dtype, found.io.reader) == ("float32", start.io.reader)
    text = path.read_text()
    assert "100.0% faster than the plan" in text
    assert ", predicted " in text
    assert "too much in flight" in text


@pytest.mark.slow
def test_where_nothing_is_faster_the_plan_is_written(
    tiny: Path, tmp_path: Path
) -> None:
    search = tuning(tiny, lambda model, policy, work: 1000.0)
    log = TuneLog(tmp_path / "tuned.yaml", search.job, restart=False)
    text = tuned_yaml(search, finish(search, log), log.timings)
    planned = search.plan.policy.model_dump(mode="json", exclude_unset=True)
    assert yaml.safe_load(text) == planned
    assert "the plan stays as it was" in text


@pytest.mark.slow
def test_a_search_stopped_at_any_time_measures_nothing_twice(
    tiny: Path, tmp_path: Path
) -> None:
    num = 0

    def stopped(model: Path, policy: Policy, work: Slice) -> float:
        nonlocal num
        num += 1
        if num % 3 == 0:
            raise KeyboardInterrupt
        return by_micro_batch(model, policy, work)

    output = tmp_path / "tuned.yaml"
    while True:
        search = tuning(tiny, stopped)
        log = TuneLog(output, search.job, restart=False)
        try:
            verdict = finish(search, log)
            break
        except KeyboardInterrupt:
            assert not output.exists()
    other = tuning(tiny, by_micro_batch)
    undisturbed = TuneLog(tmp_path / "other.yaml", other.job, restart=False)
    assert finish(other, undisturbed) == verdict
    assert undisturbed.timings == log.timings


@pytest.mark.slow
def test_a_start_that_cannot_run_ends_the_search(tiny: Path, tmp_path: Path) -> None:
    def never(model: Path, policy: Policy, work: Slice) -> float:
        raise DoesNotFitError("nothing fits")

    search = tuning(tiny, never)
    log = TuneLog(tmp_path / "tuned.yaml", search.job, restart=False)
    with pytest.raises(DoesNotFitError, match="nothing fits"):
        finish(search, log)
    assert log.timings == []


def test_measurements_of_another_search_are_refused(tmp_path: Path) -> None:
    output = tmp_path / "tuned.yaml"
    beside = tmp_path / f"tuned.yaml{SUFFIX}"
    beside.write_text(json.dumps({"version": 1, "job": {"model": 1}, "timings": []}))
    assert TuneLog(output, {"model": 1}, restart=False).timings == []
    with pytest.raises(UsageError, match=r"the model was another.*--restart"):
        TuneLog(output, {"model": 2}, restart=False)
    TuneLog(output, {"model": 2}, restart=True)
    beside.write_text("{")
    with pytest.raises(UsageError, match=r"is not valid JSON.*--restart"):
        TuneLog(output, {"model": 1}, restart=False)
    beside.write_text("{}")
    with pytest.raises(UsageError, match=r"holds no measurements.*--restart"):
        TuneLog(output, {"model": 1}, restart=False)
    beside.unlink()
    output.write_text("mine: true")
    with pytest.raises(UsageError, match=r"nothing beside it says"):
        TuneLog(output, {"model": 1}, restart=False)


@pytest.mark.slow
def test_slices_are_of_the_jobs_own_rows(tiny: Path, tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text(
        '{"text": "a few words"}\n{"text": ""}\n{"text": "and some more"}\n'
    )
    sample = sample_of([rows], tiny, Score())
    assert [row["text"] for row in sample.rows] == ["a few words", "and some more"]
    work = sample.cut(Score(), 64, 2)
    assert sum(work.lengths) >= 128
    assert sum(work.lengths[:-1]) < 128
    generating = sample.cut(Generate(64), 8, 2)
    assert (len(generating.rows), generating.task.new_tokens) == (8, 16)


@pytest.mark.slow
@pytest.mark.parametrize("task", TASKS.values(), ids=lambda task: task.name)
def test_every_task_can_be_measured(
    task: type[Task], tiny: Path, tmp_path: Path
) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"text": "a few words"}\n{"text": "and some more"}\n')
    typical = task.typical(2)
    sample = sample_of([rows], tiny, typical)
    assert len(sample.rows) == 2
    policy = Policy(device_memory="2MiB", dtype="float32")
    work = sample.cut(typical, 2 if typical.keeps_kv else sum(sample.lengths), 1)
    assert measured_rate(tiny, policy, work) > 0
    plan = make_plan(tiny, policy, MACHINE, Workload(typical, sample.mean_length))
    rate = predicted_rate(plan.choice, work)
    assert rate is not None
    assert rate > 0
    named = Tuning(plan, sample).job["task"].get("name")
    assert named == (None if task in (Score, Generate) else task.name), "as it was"


def test_rows_that_need_labels_are_not_made_up() -> None:
    with pytest.raises(UsageError, match="rows for classify cannot be made up"):
        made_up(Classify(), 16)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "there is none"),
        ("no row", "line 1 is not valid JSON"),
        ('{"prompt": "not to be scored"}', "completion"),
    ],
)
def test_input_without_a_row_to_measure_says_why(
    tiny: Path, tmp_path: Path, text: str, words: str
) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text(text)
    with pytest.raises(InputError, match=f"nothing can be measured: .*{words}"):
        sample_of([rows], tiny, Score())


def test_an_output_that_cannot_be_written_is_found_before_anything_is_measured(
    tmp_path: Path,
) -> None:
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(OutputError, match="cannot write"):
        TuneLog(tmp_path / "file" / "tuned.yaml", {"model": 1}, restart=False)


@pytest.mark.slow
@pytest.mark.parametrize("task", ["score", "generate"])
def test_the_command_measures_and_its_policy_runs(
    tiny: Path, tmp_path: Path, task: str
) -> None:
    machine = tmp_path / "machine.yaml"
    machine.write_text(MACHINE.to_yaml())
    output = tmp_path / "tuned.yaml"
    command = ["tune", str(tiny), "-o", str(output), "--machine", str(machine)]
    command += ["--task", task, "--prompt", "8", "--new", "2"]
    settings = [
        "dtype=float32",
        "tokens_in_flight=32",
        "sequences_in_flight=4",
        "micro_batch_sequences=2",
        "device_memory=64MiB",
        "lookahead=2",
        f"io={{reader: threads, threads: 2, cache: {tmp_path}}}",
    ]
    for setting in settings:
        command += ["--set", setting]
    if task == "score":
        everything = [*command, "--set", "micro_batch_tokens=16"]
        refused = CliRunner().invoke(app, everything)
        assert "sets all that could be tried" in str(refused.exception)
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0, result.exception
    assert " to make, of the plan and " in result.output
    assert " and loading, by the plan" in result.output
    assert Policy.from_yaml(output).dtype == "float32"
    measured = json.loads((tmp_path / f"tuned.yaml{SUFFIX}").read_text())["timings"]
    assert {timing["lap"] for timing in measured} <= set(range(LAPS))
    assert [] in [timing["settings"] for timing in measured], "the plan itself"
    assert any(timing["settings"] for timing in measured)
    again = CliRunner().invoke(app, command)
    assert again.exit_code == 0
    assert f"all {len(measured)} measurements are there" in again.output
    kept = json.loads((tmp_path / f"tuned.yaml{SUFFIX}").read_text())["timings"]
    assert kept == measured, "all was known"


@pytest.mark.slow
def test_no_more_memory_is_tried_than_this_process_may_take(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plans = []

    def planned(*args: object, **options: object) -> object:
        plans.append(options)
        raise DoesNotFitError("planned")

    monkeypatch.setattr("penstock.offload.plans.plan.make_plan", planned)
    command = ["tune", str(tiny), "-o", str(tmp_path / "tuned.yaml")]
    CliRunner().invoke(app, [*command, "--set", "memory=1GiB"])
    assert plans == [{"host_bytes": 1 << 30}]

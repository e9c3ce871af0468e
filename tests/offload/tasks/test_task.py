"""What the command line, jobs, plans and searches ask of a task."""

from __future__ import annotations

import dataclasses
import json
import pickle
import subprocess
import sys
from typing import Any

import pytest
from typer.testing import CliRunner

import penstock
from penstock.io.errors import UsageError
from penstock.offload.cli import app
from penstock.offload.commands.task_options import parameters_of, task_from
from penstock.offload.files.json_rows import columns_of
from penstock.offload.policy import Policy
from penstock.offload.tasks.classify_task import Classify
from penstock.offload.tasks.embed_task import Embed
from penstock.offload.tasks.generate_task import Generate
from penstock.offload.tasks.registry import TASKS, task_named
from penstock.offload.tasks.score_task import Score
from penstock.offload.tasks.task import Task, options_of
from penstock.offload.tasks.task_progress import add_up

ALL = [task.typical(5) for task in TASKS.values()]
POLICY = Policy(
    micro_batch_tokens=64,
    tokens_in_flight=256,
    micro_batch_sequences=4,
    sequences_in_flight=32,
)


@pytest.mark.parametrize("task", ALL, ids=lambda task: task.name)
def test_a_task_is_a_value(task: Task) -> None:
    assert TASKS[task.name] is type(task)
    assert task == pickle.loads(pickle.dumps(task))
    with pytest.raises(dataclasses.FrozenInstanceError):
        task.name = "other"  # type: ignore[misc]
    assert callable(getattr(penstock, task.name)), "what Python code calls"


@pytest.mark.parametrize("task", ALL, ids=lambda task: task.name)
def test_every_option_is_in_the_identity_as_json_gives_it_back(task: Task) -> None:
    found = task.identity()
    assert found["task"] == task.name
    assert json.loads(json.dumps(found)) == found
    hidden = {"temperature"}  # among generate's options
    assert set(found) == {"task", *options_of(type(task))} - hidden


def test_identities_are_as_jobs_that_were_begun_have_them() -> None:
    assert list(Score(8, 4).identity().items()) == [
        ("task", "score"),
        ("window", 8),
        ("stride", 4),
    ]
    assert list(Embed().identity().items()) == [
        ("task", "embed"),
        ("pooling", "auto"),
        ("normalize", None),
        ("truncate", None),
    ]
    assert Classify((" a", " b")).identity() == {
        "task": "classify",
        "labels": [" a", " b"],
    }
    made = Generate(3, ("end",), 0.5, 7, {"temperature": 1.0, "top_p": 0.9})
    assert list(made.identity().items()) == [
        ("task", "generate"),
        ("max_new_tokens", 3),
        ("stop", ["end"]),
        ("seed", 7),
        ("options", {"temperature": 0.5, "top_p": 0.9}),
    ]


@pytest.mark.parametrize("task", ALL, ids=lambda task: task.name)
def test_progress_of_several_processes_adds_up(task: Task) -> None:
    progress, part = task.new_progress(), task.new_progress()
    part.rows_done = 3
    add_up(progress, [part, part])
    assert progress.rows_done == 6
    assert progress.tokens_counted == 0


def test_how_tasks_are_planned_for() -> None:
    by_tokens, by_sequences = Score(), Generate(5)
    assert (by_tokens.in_flight_key, by_tokens.micro_batch_key) == (
        "tokens_in_flight",
        "micro_batch_tokens",
    )
    assert (by_sequences.in_flight_key, by_sequences.micro_batch_key) == (
        "sequences_in_flight",
        "micro_batch_sequences",
    )
    assert by_tokens.in_flight(POLICY) == 256
    assert by_sequences.in_flight(POLICY) == 32
    assert not Embed().runs_head
    assert [task.new_tokens for task in ALL] == [0, 5, 0, 0]


def test_what_the_policy_promises_a_job() -> None:
    assert Score().promised(POLICY, 9) == {"micro_batches_in_flight": 4, "passes": 3}
    assert Classify().promised(POLICY, 9)["passes"] == 6, "prompts, then labels"
    found = Generate(5).promised(POLICY, 9)
    assert found == {"micro_batches_in_flight": 8, "passes": 10}


def test_a_slice_of_generating_is_shorter_and_never_longer() -> None:
    assert Generate(64).shortened(8) == Generate(8)
    assert Generate(4).shortened(8) == Generate(4)
    assert Score(9).shortened(8) == Score(9)


def test_options_are_read_from_the_command_line() -> None:
    given: dict[str, Any] = {
        "max_new_tokens": 3,
        "stop": ["a", "b"],
        "temperature": None,
        "seed": 0,
        "options": ["top_p=0.9", "num_beams=4"],
    }
    found = task_from(Generate, given)
    assert found == Generate(3, ("a", "b"), options={"top_p": 0.9, "num_beams": 4})
    assert [each.name for each in parameters_of(Generate)] == list(given)
    bare = {**given, "stop": None, "options": None}
    assert task_from(Generate, bare) == Generate(3)
    with pytest.raises(UsageError, match="seed is no --option: give --seed"):
        task_from(Generate, {**given, "options": ["seed=3"]})


@pytest.mark.parametrize("command", ["plan", "tune"])
def test_plan_and_tune_know_all_tasks(command: str) -> None:
    printed = CliRunner().invoke(app, [command, "--help"], env={"COLUMNS": "200"})
    assert "|".join(TASKS) in printed.output
    wrong = CliRunner().invoke(app, [command, "model", "-o", "x", "--task", "skore"])
    assert wrong.exit_code == 2


def test_a_task_that_is_none_is_named() -> None:
    with pytest.raises(UsageError, match="no task 'skore': score, generate"):
        task_named("skore")


def test_options_of_python_functions_make_the_same_tasks() -> None:
    assert Classify.of(labels=[" a", " b"]) == Classify((" a", " b"))
    found = Generate.of(max_new_tokens=3, stop=["x"], seed=2, temperature=None, top_p=1)
    assert found == Generate(
        3, ("x",), seed=2, options={"temperature": None, "top_p": 1}
    )
    with pytest.raises(TypeError):
        Score.of(windw=3)


def test_tasks_are_known_without_torch() -> None:
    """Or `penstock --help` would take seconds."""
    code = (
        "import sys; import penstock.offload.tasks.registry; "
        "print([n for n in ('torch', 'transformers', 'numpy') if n in sys.modules])"
    )
    command = [sys.executable, "-c", code]
    found = subprocess.run(command, capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"


def test_a_made_up_row_has_what_the_task_needs() -> None:
    assert Score().made_up_row(7) == {"text": "7"}
    assert Classify().made_up_row(7) is None, "it would have no labels"


def test_a_task_finds_its_keys_in_files_of_columns() -> None:
    for task in ALL:
        assert task.row_keys.keys() <= columns_of(task.row_keys)
    assert "query" in columns_of({"query": '"query"'}), "also those that no other has"

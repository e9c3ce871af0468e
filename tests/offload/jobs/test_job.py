"""Whole jobs with a model: ended by signals and otherwise, gone on with, and alike."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from test_score import run as command

import forked_python
from checkpoint import make_checkpoint
from jobs import Killed, read_lines
from penstock import Policy
from penstock.io.errors import InputError, StoppedError, UsageError
from penstock.offload.files.parts import Cut, NumberedRows
from penstock.offload.jobs.job import Done, Job
from penstock.offload.tasks.generate_task import Generate
from penstock.offload.tasks.score_task import Score
from penstock.offload.tasks.task import Task
from penstock.offload.tasks.task_progress import TaskProgress
from shared_work import SMALL_STEPS
from shares import shared

pytestmark = pytest.mark.usefixtures("own_processes", "no_leaks")

WORDS = ["the", "quick", "brown", "fox", "jumps", "over", "zwölf", "Boxkämpfer"]
NUM_ROWS = 32


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models") / "tiny"
    return make_checkpoint(path, "tiny", dtype="float32", shards_of="100KB")


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """Ragged rows, some of which nothing can be made of."""
    path = tmp_path / "in.jsonl"
    rows = [
        {"id": n, "text": " ".join(WORDS[n % 5 : n % 5 + 2 + n * 7 % 5])}
        for n in range(NUM_ROWS)
    ]
    rows[7] = {"id": 7, "text": "word " * 3_000}
    rows[20] = {"id": 20, "wrong": 1}
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


POLICY = SMALL_STEPS.with_settings(["sequences_in_flight=4"])


@dataclass
class Watched:
    """`task` in small parts, which does something once it has some results."""

    task: Task
    at: int = -1
    then: Callable[[], None] = field(default=lambda: None)
    num_rows: int = 6
    progress: Any = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self.task, name)

    def cut(self, policy: Policy) -> Cut:
        return Cut(self.num_rows, 1 << 20)

    def results(
        self,
        model: Any,
        tokenizer: Any,
        parts: Iterator[NumberedRows],
        progress: TaskProgress,
    ) -> Iterator[dict[str, Any]]:
        self.progress = progress
        found = self.task.results(model, tokenizer, parts, progress)
        for number, result in enumerate(found):
            if number == self.at:
                self.then()
            yield result


def scoring() -> Task:
    return Score()


def generating() -> Task:
    return Generate(3, seed=3, options={"temperature": 1.2})


def sampling_beams() -> Task:
    return Generate(2, seed=3, options={"num_beams": 2, "do_sample": True})


def run(
    task: Task | Watched, folder: Path, source: Any, output: Path, **options: Any
) -> tuple[Done, Any]:
    watched: Any = task if isinstance(task, Watched) else Watched(task)
    policy = options.pop("policy", POLICY)
    job = Job(watched, folder, source, output, policy, **options)
    return job.run(Console(quiet=True)), watched.progress


def kill() -> None:
    raise Killed


@pytest.mark.slow
@pytest.mark.parametrize(
    "make", shared([scoring, generating, sampling_beams], lambda place, _: place < 2)
)
def test_a_job_that_was_killed_goes_on_to_the_same_bytes(
    make: Callable[[], Task], folder: Path, source: Path, tmp_path: Path
) -> None:
    whole, output = tmp_path / "whole.jsonl", tmp_path / "out.jsonl"
    run(make(), folder, source, whole)
    for at in (14, 9):
        with pytest.raises(Killed):
            run(Watched(make(), at, kill), folder, source, output)
    done, progress = run(make(), folder, source, output)
    assert output.read_bytes() == whole.read_bytes()
    assert 0 < progress.rows_done < NUM_ROWS
    assert (done.num_rows, done.num_errors) == (NUM_ROWS, 2)
    assert done.report is not None
    assert done.report["rows_before"] == NUM_ROWS - progress.rows_done


def test_a_part_has_the_same_bits_without_the_others(
    folder: Path, source: Path, tmp_path: Path
) -> None:
    """Rows of two parts are never packed together."""
    lines = source.read_bytes().splitlines(keepends=True)
    run(Score(), folder, source, tmp_path / "whole.jsonl")
    second = tmp_path / "second.jsonl"
    second.write_bytes(b"".join(lines[6:12]))
    run(Score(), folder, second, tmp_path / "alone.jsonl")
    whole = read_lines(tmp_path / "whole.jsonl")
    assert read_lines(tmp_path / "alone.jsonl") == whole[6:12]


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)]
)
def test_the_first_signal_finishes_what_is_under_way(
    number: int, code: int, folder: Path, source: Path, tmp_path: Path
) -> None:
    before = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)]
    output, whole = tmp_path / "out.jsonl", tmp_path / "whole.jsonl"
    stopped = Watched(Score(), 2, lambda: signal.raise_signal(number))
    with pytest.raises(StoppedError, match="run the same command again") as caught:
        run(stopped, folder, source, output)
    assert caught.value.exit_code == code
    assert [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)] == before
    parts = len(list((tmp_path / "out.jsonl.parts").glob("part-*")))
    assert 0 < parts < 7
    assert stopped.progress.rows_done == parts * 6, "all that was begun was kept"
    run(Score(), folder, source, output)
    run(Score(), folder, source, whole)
    assert output.read_bytes() == whole.read_bytes()


def test_the_second_signal_stops_at_once(
    folder: Path, source: Path, tmp_path: Path
) -> None:
    output = tmp_path / "out.jsonl"

    def twice() -> None:
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGINT)

    stopped = Watched(Score(), 8, twice)
    with pytest.raises(StoppedError, match="6 rows are done") as caught:
        run(stopped, folder, source, output)
    assert caught.value.exit_code == 143
    assert stopped.progress.rows_done <= 12
    assert not output.exists()
    run(Score(), folder, source, output)
    assert len(read_lines(output)) == NUM_ROWS


def test_a_signal_that_was_ignored_before_stays_so(
    folder: Path, source: Path, tmp_path: Path
) -> None:
    """The shell ignores SIGINT for background jobs: `penstock ... &`."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        ignored = Watched(Score(), 2, lambda: signal.raise_signal(signal.SIGINT))
        done, _ = run(ignored, folder, source, tmp_path / "out.jsonl")
    finally:
        signal.signal(signal.SIGINT, before)
    assert done.num_rows == NUM_ROWS


def test_a_signal_after_the_last_part_was_read_changes_nothing(
    folder: Path, source: Path, tmp_path: Path
) -> None:
    output = tmp_path / "out.jsonl"
    last = lambda: signal.raise_signal(signal.SIGINT)  # noqa: E731
    done, _ = run(Watched(Score(), NUM_ROWS - 1, last), folder, source, output)
    assert done.num_rows == NUM_ROWS
    assert output.exists()


@pytest.mark.slow
def test_failed_rows_are_done_again_and_the_others_stay(
    folder: Path, source: Path, tmp_path: Path
) -> None:
    output = tmp_path / "out.jsonl"
    run(Score(), folder, source, output)
    before = output.read_bytes().splitlines()
    done, progress = run(Score(), folder, source, output, mode="retry")
    assert output.read_bytes().splitlines() == before
    assert progress.rows_done == 2
    assert done.num_errors == 2
    assert done.report is not None
    assert done.report["rows_before"] == NUM_ROWS - 2
    assert done.report["rows_failed_before"] == 0


def test_logits_that_are_no_numbers_are_errors_and_never_in_the_output(
    folder: Path, source: Path, tmp_path: Path
) -> None:
    class Poisoned(Watched):
        def results(self, model: Any, tokenizer: Any, parts: Any, progress: Any) -> Any:
            hook = model.lm_head.register_forward_hook(
                lambda module, args, out: out * float("nan")
            )
            yield from super().results(model, tokenizer, parts, progress)
            hook.remove()

    output = tmp_path / "out.jsonl"
    done, _ = run(Poisoned(Score()), folder, source, output)
    assert done.num_errors == NUM_ROWS
    for line in output.read_text().splitlines():
        found = json.loads(line, parse_constant=lambda name: pytest.fail(name))
        assert "error" in found


@pytest.mark.parametrize("make", [scoring, generating])
def test_failing_rows_do_not_pile_up(
    make: Callable[[], Task], folder: Path, tmp_path: Path
) -> None:
    """However many there are: those of a part are handed on before the next one."""
    source, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text('{"wrong": 1}\n' * 60)

    class Counting(Watched):
        def results(self, model: Any, tokenizer: Any, parts: Any, progress: Any) -> Any:
            num_taken = 0

            def counted() -> Any:
                nonlocal num_taken
                for part in parts:
                    num_taken += len(part)
                    yield part

            for result in super().results(model, tokenizer, counted(), progress):
                assert num_taken - progress.rows_done < 6
                yield result

    done, _ = run(Counting(make()), folder, source, output)
    assert done.num_errors == 60


def test_a_lone_surrogate_is_its_rows_error(folder: Path, tmp_path: Path) -> None:
    source, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_bytes(
        b'{"id": "a", "text": "half \\ud83d of it"}\n{"id": "\\udc00", "text": "a b"}\n'
    )
    done, _ = run(Score(), folder, source, output)
    first, second = read_lines(output)
    assert "the tokenizer does not take this text" in first["error"]
    assert second["id"] == "\udc00"
    assert done.num_errors == 1


def test_an_input_that_ends_in_the_middle_keeps_what_came_before(
    folder: Path, source: Path, tmp_path: Path
) -> None:
    import gzip

    whole = gzip.compress(source.read_bytes() * 4)
    cut = tmp_path / "in.jsonl.gz"
    cut.write_bytes(whole[: len(whole) * 2 // 3])
    output = tmp_path / "out.jsonl"
    with pytest.raises(InputError, match=r"in.jsonl.gz is cut off"):
        run(Score(), folder, cut, output)
    assert len(list((tmp_path / "out.jsonl.parts").glob("part-*"))) > 2


def test_a_failing_load_leaves_nothing(source: Path, tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "tiny", "tiny", dtype="float32")
    (folder / "tokenizer.json").write_text("{}")
    (folder / "tokenizer_config.json").unlink()
    with pytest.raises(UsageError, match="no tokenizer"):
        run(Score(), folder, source, tmp_path / "out.jsonl")
    assert sorted(os.listdir(tmp_path)) == ["in.jsonl", "tiny"]


def test_another_model_of_the_same_shape_is_refused(
    source: Path, tmp_path: Path
) -> None:
    folder = make_checkpoint(tmp_path / "tiny", "tiny", dtype="float32")
    output = tmp_path / "out.jsonl"
    run(Score(), folder, source, output)
    weights = folder / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    with pytest.raises(UsageError, match=r"model model\.safetensors is another one"):
        run(Score(), folder, source, output)


def test_other_micro_batches_are_announced_and_taken(
    folder: Path, source: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Out of memory, say: the job must go on with smaller ones."""
    output = tmp_path / "out.jsonl"
    with pytest.raises(Killed):
        run(Watched(Score(), 20, kill), folder, source, output)
    other = POLICY.with_settings(["micro_batch_tokens=16"])
    run(Score(), folder, source, output, policy=other)
    assert "micro_batch_tokens was 32 and is 16 since the job began" in caplog.text
    assert len(read_lines(output)) == NUM_ROWS


# The command line, in a process of its own.


IN_FLIGHT = {"micro_batch_tokens": 512, "tokens_in_flight": 4096}
"""Else a plan chooses, by the lengths of rows, which those of a stream do not tell."""
SET = [word for key, n in IN_FLIGHT.items() for word in ("--set", f"{key}={n}")]


def one_thread() -> None:
    torch.set_num_threads(1)  # as here: the last bits depend on it


@pytest.mark.slow
def test_rows_come_from_standard_input_and_go_to_standard_output(
    folder: Path, source: Path, tmp_path: Path
) -> None:
    done = forked_python.run(
        *forked_python.COMMAND,
        *("score", folder, "-", "-o", "-", *SET),
        stdin=source.read_bytes(),
        first=one_thread,
    )
    assert done.returncode == 1, done.stderr
    output = tmp_path / "out.jsonl"
    job = Job(Score(), folder, source, output, Policy(**IN_FLIGHT))
    job.run(Console(quiet=True))
    assert done.stdout == output.read_text()


def test_a_finished_job_says_so_and_how_it_went(
    folder: Path, source: Path, tmp_path: Path
) -> None:
    output = tmp_path / "out.jsonl"
    Job(Score(), folder, source, output, Policy()).run(Console(quiet=True))
    again = command("score", folder, source, "-o", output)
    assert again.returncode == 1
    assert "is done already: 32 rows" in again.stderr
    assert "2 of 32 rows failed" in again.stderr

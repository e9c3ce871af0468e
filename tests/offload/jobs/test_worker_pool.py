"""Processes that share a job: who does which part, and who does it again."""

from __future__ import annotations

import logging
import os
import re
import signal
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection
from pathlib import Path

import pytest

import worker_targets
from penstock.io.errors import InputError, MachineError, UsageError
from penstock.offload.files.parts import Cut, OutputPart, PartRecord, Position
from penstock.offload.jobs import worker_pool
from penstock.offload.jobs.worker_pool import MOST_DEATHS, WorkerPool
from penstock.offload.monitoring import stopped_workers

ROWS = 3


@pytest.fixture(autouse=True)
def _no_leaks(request: pytest.FixtureRequest) -> None:
    resource_tracker.ensure_running()  # Python's own, which stays
    request.getfixturevalue("no_leaks")


class Written:
    """An output in memory."""

    redo: frozenset[int] = frozenset()
    is_input_doubtful = False
    cut = Cut(ROWS, 1 << 20)

    def __init__(self, *, is_kept: bool = True) -> None:
        self.is_kept = is_kept
        self.lines: dict[int, list[bytes]] = {}
        self.done: dict[int, PartRecord] = {}
        self.num_rows = self.num_errors = 0

    def known(self, part: OutputPart) -> OutputPart:
        return part

    def write(self, part: OutputPart, lines: Sequence[bytes], num_errors: int) -> None:
        assert part.number not in self.lines, "no part is written twice"
        self.lines[part.number] = list(lines)

    def finish(self) -> None: ...


def parts(num: int, error: Exception | None = None) -> Iterator[OutputPart]:
    for number in range(num):
        yield OutputPart(number, number * ROWS, [{}] * ROWS, Position(), "")
    if error is not None:
        raise error


def run(
    targets: Sequence[Callable[[Connection], None]],
    output: Written,
    found: Iterator[OutputPart] | None = None,
) -> WorkerPool:
    with WorkerPool(targets, parts(6) if found is None else found, output) as pool:
        pool.start()
        pool.finish()
    return pool


def all_lines(output: Written) -> list[bytes]:
    return [line for number in sorted(output.lines) for line in output.lines[number]]


EXPECTED = [b"%d\n" % number for number in range(6 * ROWS)]


@pytest.mark.slow
def test_each_part_is_done_once_and_what_workers_say_is_said_once(
    caplog: pytest.LogCaptureFixture,
) -> None:
    output = Written()
    with caplog.at_level(logging.WARNING):
        pool = run([worker_targets.works] * 2, output)
    assert all_lines(output) == EXPECTED
    assert (pool.num_rows, pool.num_errors) == (6 * ROWS, 6)
    assert sum(pool.num_handed.values()) == 6 * ROWS
    assert list(pool.counted.values()) == ["all", "all"]
    assert [record.message for record in caplog.records] == ["said by each"]


@pytest.mark.slow
@pytest.mark.parametrize("speaks", [False, True])
def test_the_parts_of_a_worker_that_was_killed_are_done_again(
    speaks: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    output, marker = Written(), tmp_path / "died"
    target = partial(worker_targets.dies_once, marker=marker, speaks=speaks)
    pool = run([target, target], output)
    assert all_lines(output) == EXPECTED
    assert len(pool.dead) == 1
    assert "was killed by signal 9 with rows" in caplog.text


@pytest.mark.slow
@pytest.mark.parametrize("speaks", [False, True])
def test_the_parts_of_a_worker_that_is_stopped_are_done_again(
    speaks: bool,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(worker_pool, "LOOK_SECONDS", 0.02)
    output, marker = Written(), tmp_path / "stopped"
    target = partial(
        worker_targets.dies_once, marker=marker, speaks=speaks, number=signal.SIGSTOP
    )
    pool = run([target, target], output)
    assert all_lines(output) == EXPECTED
    assert len(pool.dead) == 1
    assert "is stopped: if it does not go on" in caplog.text
    assert "was killed by signal 9 with rows" in caplog.text


@pytest.mark.slow
def test_a_worker_that_goes_on_in_time_stays(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(worker_pool, "LOOK_SECONDS", 0.02)
    monkeypatch.setattr(stopped_workers, "MOST_LOOKS", 10_000)

    def say(message: str) -> bool:
        if "is stopped" in message:
            os.kill(int(re.findall(r"process (\d+)", message)[0]), signal.SIGCONT)
        return True

    caplog.handler.addFilter(lambda record: say(record.getMessage()))
    output = Written()
    pool = run([worker_targets.stops_itself], output)
    assert all_lines(output) == EXPECTED
    assert not pool.dead
    assert "is stopped" in caplog.text


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "words"), [(4, "with rows 13 to 15"), (-1, "while it began")]
)
def test_what_kills_each_worker_ends_the_job(
    number: int, words: str, tmp_path: Path
) -> None:
    output, log = Written(), tmp_path / "log"
    target = partial(worker_targets.dies_of, number=number, log=log)
    with pytest.raises(MachineError, match=f"ended with exit code 3 {words}"):
        run([target], output)
    assert len(log.read_text().split()) == MOST_DEATHS
    assert list(output.lines) == ([0, 1, 2, 3] if number > 0 else [])


@pytest.mark.slow
def test_an_error_of_a_worker_ends_the_job_though_others_wait() -> None:
    """One waits for ever for what nobody sends: it is killed."""
    output = Written()
    with pytest.raises(UsageError, match="it cannot be done"):
        run([worker_targets.fails, worker_targets.waits], output)


@pytest.mark.slow
def test_rows_that_cannot_be_read_end_the_parts_and_those_before_are_done() -> None:
    output = Written()
    pool = run([worker_targets.works], output, parts(2, InputError("cut off")))
    assert all_lines(output) == EXPECTED[: 2 * ROWS]
    assert str(pool.failure) == "cut off"


def test_what_is_kept_nowhere_is_written_in_order() -> None:
    for is_kept, expected in ((False, [0, 1, 2]), (True, [2, 0, 1])):
        output = Written(is_kept=is_kept)
        with WorkerPool([worker_targets.works], parts(3), output) as pool:
            found = [pool._next_part() for _ in range(3)]
            for number in (2, 0, 1):
                part = found[number]
                assert part is not None
                pool._take(part, [b"x"] * ROWS, 0)
        assert list(output.lines) == expected

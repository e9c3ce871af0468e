"""What comes from a rank of another machine is values, and never code."""

from __future__ import annotations

import datetime
import os
import pickle
import socket
from collections.abc import Iterator
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import Any
from zoneinfo import ZoneInfo

import pytest

from penstock import Policy
from penstock.io.errors import RanksError, UsageError
from penstock.offload.files.parts import OutputPart, Position
from penstock.offload.jobs.worker import Assignment
from penstock.offload.ranks.remote_ranks import RankConnection, connection_of
from penstock.offload.tasks.generate_task import Generate
from penstock.offload.tasks.score_task import Score


@dataclass(frozen=True)
class OwnScore(Score):
    """A task that is not Penstock's."""


class Runs:
    """Pickled, it names a function and what to call it with."""

    def __init__(self, function: Any, *values: Any) -> None:
        self._named = function, values

    def __reduce__(self) -> tuple[Any, ...]:
        return self._named


@pytest.fixture
def ends() -> Iterator[tuple[RankConnection, RankConnection]]:
    one, other = map(connection_of, socket.socketpair())
    with one, other:
        yield one, other


def test_work_rows_and_results_come_as_they_are(
    ends: tuple[RankConnection, RankConnection],
) -> None:
    policy = Policy(device_memory="1MiB", io={"cache": Path("there")})
    row = {
        "id": 3,
        "text": "word",
        "at": datetime.datetime(2020, 1, 2, tzinfo=ZoneInfo("UTC")),
        "price": Decimal("1.5"),
        "tags": {"a", "b"},
    }
    part = OutputPart(1, 2, [row], Position(0, 1, 2), "digest")
    task = Generate(max_new_tokens=3, options={"top_p": 0.5})
    for value in (
        Assignment(task, Path("model"), policy, 2),
        part,
        None,
        ("done", 1, [b"line"], 0, None),
    ):
        ends[0].send(value)
        assert ends[1].recv() == value
    ends[0].send(("failed", UsageError("it is wrong")))
    kind, error = ends[1].recv()
    assert kind == "failed"
    assert isinstance(error, UsageError)
    assert f"{error}" == "it is wrong"


def test_a_task_of_ones_own_comes_where_the_rank_has_it(
    ends: tuple[RankConnection, RankConnection],
) -> None:
    ends[0].send(OwnScore())
    with pytest.raises(RanksError, match="OwnScore is not expected"):
        ends[1].recv()
    one, other = socket.socketpair()
    with connection_of(one) as there, connection_of(other, [OwnScore]) as here:
        there.send(OwnScore())
        assert here.recv() == OwnScore()


@pytest.mark.parametrize(
    "content",
    [
        pickle.dumps(Runs(os.system, "true")),
        pickle.dumps(Runs(eval, "1")),
        pickle.dumps(Runs(getattr, Policy, "mro")),
        b"cwsgiref.simple_server\ndemo_app\n.",
        b"\x80\x04\x8c\x07pathlib\x8c\x07os.kill\x93.",
        pickle.dumps(Runs(getattr, OwnScore, "results")),
        b"rubbish",
        b"",
    ],
)
def test_what_names_a_function_is_refused_and_not_called(
    content: bytes, ends: tuple[RankConnection, RankConnection]
) -> None:
    ends[0].send_bytes(content)
    with pytest.raises(RanksError, match=r"no value of a job \(.*\): give all ranks"):
        ends[1].recv()

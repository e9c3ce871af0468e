"""Ranks find each other, whatever else is at their addresses."""

from __future__ import annotations

import socket
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from dataclasses import replace

import pytest

from penstock.io.errors import RanksError, UsageError
from penstock.offload.ranks import joining
from penstock.offload.ranks.joining import LOCAL, RankEnvironment, local_store

GIVEN = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "a", "MASTER_PORT": "1"}


@pytest.mark.parametrize(
    ("variables", "words"),
    [
        ({"MASTER_ADDR": ""}, "MASTER_ADDR is empty"),
        ({"LOCAL_WORLD_SIZE": "0"}, r"LOCAL_WORLD_SIZE is 0: .* WORLD_SIZE \(2\)"),
        ({"LOCAL_WORLD_SIZE": "3"}, "LOCAL_WORLD_SIZE is 3"),
        ({"LOCAL_WORLD_SIZE": "2", "LOCAL_RANK": "2"}, "LOCAL_RANK is 2, and LOCAL"),
        ({"LOCAL_RANK": "-1"}, "LOCAL_RANK is -1"),
        ({"LOCAL_RANK": "x"}, "LOCAL_RANK and LOCAL_WORLD_SIZE are numbers"),
    ],
)
def test_variables_that_cannot_be_are_one_sentence(
    variables: Mapping[str, str], words: str
) -> None:
    with pytest.raises(UsageError, match=words):
        RankEnvironment.of({**GIVEN, **variables})


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"RANK": "0"}, "RANK set in the environment, and not WORLD_SIZE, MASTER_ADDR"),
        ({"WORLD_SIZE": "2"}, "WORLD_SIZE set in the environment, and not RANK, MAST"),
    ],
)
def test_a_part_of_the_variables_is_refused(
    given: Mapping[str, str], words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A job would run alone, on each rank."""
    for name in GIVEN:
        monkeypatch.delenv(name, raising=False)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UsageError, match=words):
        RankEnvironment.found()


def test_an_address_or_a_size_of_one_is_for_another_program(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in GIVEN:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("MASTER_ADDR", LOCAL)
    monkeypatch.setenv("MASTER_PORT", "29500")
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert RankEnvironment.found() is None


def test_a_port_that_another_program_has_is_named() -> None:
    with socket.create_server((LOCAL, 0)) as listener:
        port = listener.getsockname()[1]
        words = rf"at 127.0.0.1:{port}: another program has that port; give all ranks"
        with pytest.raises(RanksError, match=words):
            joining.join(RankEnvironment(0, 2, LOCAL, port))


def test_ranks_that_are_started_again_do_not_take_older_entries(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """torchrun keeps its store over restarts. A rank that was killed early has joined
    less often than the others."""
    store = local_store()
    again = RankEnvironment.of({**GIVEN, "TORCHELASTIC_RESTART_COUNT": "1"})
    first, second = RankEnvironment(0, 2, LOCAL, 0), replace(again, master=LOCAL)
    monkeypatch.setattr(joining, "JOIN_SECONDS", 0.2)
    with pytest.raises(RanksError):
        joining.join(first, store=store)  # the other one was killed
    monkeypatch.setattr(joining, "JOIN_SECONDS", 20.0)
    found = []

    def join_other() -> None:
        with joining.join(second, store=store) as post:
            found.append(post.num_ranks)

    other = threading.Thread(target=join_other)
    other.start()
    with joining.join(replace(first, attempt="1"), store=store) as post:
        other.join()
        found.append(post.num_ranks)
    assert found == [2, 2]


def test_strangers_that_come_again_and_again_do_not_make_it_last_longer() -> None:
    with socket.create_server((LOCAL, 0)) as listener:
        listener.settimeout(0.1)
        with (
            socket.create_connection(listener.getsockname()),
            pytest.raises(TimeoutError),
        ):
            joining._accepted(
                listener, lambda: None, time.monotonic() - 1, lambda: None
            )


def test_ranks_that_share_a_job_in_different_ways_say_so() -> None:
    store, found = local_store(), []

    def join_other() -> None:
        with pytest.raises(UsageError, match="ranks 0 and 1 share the job in differ"):
            joining.connect(RankEnvironment(1, 2, LOCAL, 0), store=store, way="rows")
        found.append(1)

    other = threading.Thread(target=join_other)
    other.start()
    with pytest.raises(UsageError, match="ranks 1 and 0 share the job in different"):
        joining.join(RankEnvironment(0, 2, LOCAL, 0), store=store)
    other.join()
    assert found == [1]


@pytest.mark.parametrize("way", ["rows", "messages"])
def test_ranks_with_different_options_name_them(way: str) -> None:
    store, found = local_store(), []

    def connect(rank: int, window: str) -> None:
        where = RankEnvironment(rank, 2, LOCAL, 0)
        with pytest.raises(UsageError) as raised:
            joining.connect(where, store=store, way=way, same={"window": window})
        found.append(str(raised.value))

    other = threading.Thread(target=connect, args=(1, "8"))
    other.start()
    connect(0, "None")
    other.join()
    assert sorted(found) == [
        "rank 0 has not the options of rank 1: window (None, on rank 1 8): give all "
        "ranks the same command",
        "rank 1 has not the options of rank 0: window (8, on rank 0 None): give all "
        "ranks the same command",
    ]


def test_a_rank_that_loses_the_first_one_says_so() -> None:
    program = """
import multiprocessing, threading
from penstock.offload.jobs.worker import WorkerPipe
ours, theirs = multiprocessing.Pipe()
WorkerPipe(theirs, "the first rank is gone")
ours.close()
threading.Event().wait(20)
"""
    ended = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False
    )
    assert ended.returncode == RanksError.exit_code
    assert ended.stderr.splitlines()[-1:] == ["the first rank is gone"]

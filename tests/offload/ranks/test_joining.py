"""Ranks find each other, whatever else is at their addresses."""

from __future__ import annotations

import socket
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

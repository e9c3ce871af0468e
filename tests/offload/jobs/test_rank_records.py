"""What ranks send to the first one at the end of a job."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace

import pytest

import runs
from penstock.io.timeline import Span
from penstock.offload.jobs import rank_records
from penstock.offload.jobs.rank_records import received_records
from penstock.offload.reports.rank_record import MOST_SPANS, RankRecord
from penstock.scheduler.ranks.messages import Kind, Message
from penstock.scheduler.ranks.post import Mailbox

RECORD = runs.of_ranks().others[0]


class FirstPost:
    """The post of the first rank, to which all has come that comes."""

    def __init__(self, num_ranks: int) -> None:
        self.mail = Mailbox()
        self.num_ranks = num_ranks

    def wait(self, test: Callable[[], bool]) -> None:
        assert self.mail.lost or test(), "it would wait for ever"


def come(post: FirstPost, record: RankRecord) -> None:
    text = json.dumps(record.to_json(0.0))
    post.mail.deliver(record.rank, Message(Kind.SHARED, text=text))


@pytest.fixture(autouse=True)
def one_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rank_records, "_epoch_seconds", lambda: 0.0)


def test_records_come_in_the_order_of_ranks() -> None:
    post = FirstPost(3)
    other = replace(RECORD, rank=2)
    come(post, other)
    come(post, RECORD)
    assert [record.rank for record in received_records(post)] == [1, 2]
    assert received_records(FirstPost(1)) == []


def test_a_rank_that_is_lost_costs_its_record_only() -> None:
    post = FirstPost(3)
    come(post, RECORD)
    post.mail.lose("rank 2 is gone")
    assert [record.rank for record in received_records(post)] == [1]


def test_a_rank_that_sends_nothing_is_not_waited_for_long(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(rank_records, "_SECONDS", -1.0)
    assert received_records(FirstPost(2)) == []


@pytest.mark.parametrize("text", ["[]", "{}", "no JSON", '{"epoch_seconds": "x"}'])
def test_what_is_no_record_is_left_out(text: str) -> None:
    post = FirstPost(2)
    post.mail.deliver(1, Message(Kind.SHARED, text=text))
    assert received_records(post) == []


def test_spans_come_in_the_first_ranks_clock_the_newest_ones() -> None:
    """Clocks that began at other times of the day show the same moment."""
    many = [Span("disk", "a", n, n + 0.5, 3) for n in range(MOST_SPANS + 5)]
    sent = json.loads(json.dumps(replace(RECORD, spans=many).to_json(1000.0)))
    found = RankRecord.of(sent, 900.0)
    assert len(found.spans) == MOST_SPANS
    assert found.spans[0] == Span("disk", "a", 105.0, 105.5, 3)
    assert found.figures() == RECORD.figures()

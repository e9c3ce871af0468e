"""Brings the records of all ranks to the first one, at the end of a job."""

import json
import platform
import time
from collections.abc import Callable, Sequence
from typing import Protocol

from ...io.errors import RanksError
from ...scheduler.ranks.messages import Kind, Message
from ...scheduler.ranks.post import Mailbox, Post
from ..reports.rank_record import RankRecord
from .computed import WorkerResult

_SECONDS = 5.0
"""How long the first rank waits for what the others send at their end."""


class Inbox(Protocol):
    """The part of a post that brings messages."""

    mail: Mailbox

    @property
    def num_ranks(self) -> int: ...

    def wait(self, test: Callable[[], bool]) -> None: ...


def record_of(computed: WorkerResult, rank: int) -> RankRecord:
    """What this rank has counted and recorded."""
    found = computed.statistics
    return RankRecord(
        rank=rank,
        host=platform.node(),
        bytes_read=found.bytes_read,
        bytes_sent=found.ranks.bytes_sent,
        num_sent=found.ranks.num_sent,
        rank_wait_seconds=found.ranks.wait_seconds,
        wait_seconds=found.wait_seconds,
        compute_seconds=found.compute_seconds,
        peak_host_bytes=found.peak_host_bytes,
        spans=computed.spans,
    )


def send_record(post: Post, computed: WorkerResult) -> None:
    """Sends this rank's record to the first one. Does not wait."""
    record = record_of(computed, post.rank).to_json(_epoch_seconds())
    post.send(0, Message(Kind.SHARED, text=json.dumps(record)))


def received_records(post: Inbox) -> Sequence[RankRecord]:
    """The records of the other ranks, in order. Those of ranks that are lost, or send
    nothing for some seconds, are missing: they must not cost the job its report."""
    found: dict[int, RankRecord] = {}
    end = time.monotonic() + _SECONDS
    while len(found) < post.num_ranks - 1:
        post.wait(lambda: post.mail.has_shared() or time.monotonic() > end)
        try:
            if not post.mail.has_shared():
                break
            values = json.loads(post.mail.take_shared())
            record = RankRecord.of(values, _epoch_seconds())
        except (RanksError, TypeError, KeyError, ValueError, AttributeError):
            break
        found[record.rank] = record
    return [found[rank] for rank in sorted(found)]


def _epoch_seconds() -> float:
    """The time of day at which the clock of spans was 0: machines have clocks of their
    own, and agree about the time of day to a few milliseconds."""
    return time.time() - time.perf_counter()

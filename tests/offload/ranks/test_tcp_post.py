"""Messages over TCP: whole, in order, and never waited for in vain."""

from __future__ import annotations

import socket
import struct
from collections.abc import Iterator
from functools import partial
from threading import Thread

import pytest
import torch

from penstock.io.errors import RanksError
from penstock.offload.ranks import joining, wire
from penstock.offload.ranks.stuck_watch import StuckWatch
from penstock.offload.ranks.tcp_post import TcpPost
from penstock.offload.ranks.wire import packed, unpacked
from penstock.scheduler.ranks.messages import Kind, Message
from penstock.scheduler.ranks.stages import Address

pytestmark = pytest.mark.usefixtures("no_leaks")
AT = Address(1, 2, 0, 3)


def _read(data: bytes) -> Message:
    left = memoryview(data)

    def receive(buffer: memoryview) -> None:
        nonlocal left
        buffer[:] = left[: len(buffer)]
        left = left[len(buffer) :]

    found = unpacked(receive)
    assert not left
    return found


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.bool]
)
@pytest.mark.parametrize("shape", [(2, 3, 5), (0, 4), (1,), ()])
def test_a_message_is_the_same_after_its_way(
    dtype: torch.dtype, shape: tuple[int, ...]
) -> None:
    tensor = torch.randn(shape).to(dtype)
    sent = Message(Kind.OUTPUT, AT, 7, 2**32 - 1, "t-ü", tensor)
    found = _read(b"".join(packed(sent)))
    assert (found.kind, found.address, found.stage) == (Kind.OUTPUT, AT, 7)
    assert (found.fingerprint, found.text) == (2**32 - 1, "t-ü")
    assert found.tensor.dtype == dtype
    assert torch.equal(found.tensor, tensor)


def test_a_tensor_that_is_not_contiguous_is_sent_as_it_looks() -> None:
    tensor = torch.arange(12.0).view(3, 4).T
    found = _read(b"".join(packed(Message(Kind.OUTPUT, AT, tensor=tensor))))
    assert torch.equal(found.tensor, tensor)


@pytest.fixture
def pair() -> Iterator[tuple[TcpPost, TcpPost]]:
    one, other = socket.socketpair()
    for each in (one, other):
        each.settimeout(2.0)
    posts = TcpPost(0, {1: one}), TcpPost(1, {0: other})
    yield posts
    for post in posts:
        post.close()


def test_messages_come_in_order_and_may_be_changed_afterwards(
    pair: tuple[TcpPost, TcpPost],
) -> None:
    one, other = pair
    for call in range(20):
        tensor = torch.full((300, 100), float(call))
        one.send(1, Message(Kind.OUTPUT, AT._replace(call=call), tensor=tensor))
        tensor.zero_()
    for call in reversed(range(20)):
        address = AT._replace(call=call)
        other.wait(partial(other.mail.is_ready, address, 0))
        assert other.mail.take(address, 0).tensor.unique().tolist() == [call]


def test_a_rank_that_has_closed_is_not_waited_for(
    pair: tuple[TcpPost, TcpPost],
) -> None:
    one, other = pair
    one.send(1, Message(Kind.OUTPUT, AT))
    one.close("it is full")
    other.wait(lambda: other.mail.is_ready(AT, 0))
    other.mail.take(AT, 0)  # what came before stays
    later = AT._replace(call=4)
    other.wait(lambda: other.mail.is_ready(later, 0))
    with pytest.raises(RanksError, match="rank 0 has failed: it is full"):
        other.mail.take(later, 0)
    assert not other.mail.lost


def test_a_rank_that_is_killed_is_lost(pair: tuple[TcpPost, TcpPost]) -> None:
    one, other = pair
    one._peers[1].shutdown(socket.SHUT_RDWR)  # as the kernel does for a dead process
    other.wait(lambda: False)
    assert "rank 0 is gone: it has ended, or was killed" in other.mail.lost


def test_a_rank_that_is_silent_is_lost() -> None:
    one, silent = socket.socketpair()
    one.settimeout(0.2)
    with TcpPost(0, {1: one}) as post:
        post.wait(lambda: False)
        assert "it has sent nothing for" in post.mail.lost
    silent.close()


def test_ranks_that_wait_for_each_other_are_found() -> None:
    now = 0.0
    watch = StuckWatch(2, 1.5, 3.0, clock=lambda: now)

    def play(waits: tuple[bool, bool], events: tuple[int, int], own: int) -> list[bool]:
        nonlocal now
        found = []
        for _ in range(8):
            now += 0.5
            for rank, (wait, num) in enumerate(zip(waits, events, strict=True)):
                watch.hear(rank, wait, num)
            found.append(watch.is_stuck(own))
        return found

    assert play((True, False), (5, 5), 7) == [False] * 8  # one computes
    assert play((True, True), (5, 5), 7) == [False] * 6 + [True] * 2
    assert play((True, True), (6, 5), 7)[:6] == [False] * 6  # one got a message
    assert play((True, True), (6, 5), 8)[:6] == [False] * 6  # this one did
    now += 2.0
    assert not watch.is_stuck(8)  # nothing was heard for long: it may be sending


def test_two_ranks_that_only_wait_are_told(
    pair: tuple[TcpPost, TcpPost], monkeypatch: pytest.MonkeyPatch
) -> None:
    one, other = pair
    for post in pair:
        post._stuck = StuckWatch(1, 1.5, 0.2)
    waits = Thread(target=lambda: other.wait(lambda: False))
    waits.start()
    one.wait(lambda: False)
    waits.join()
    assert "all ranks wait for each other" in one.mail.lost


@pytest.mark.parametrize(
    "dims", [(-1, -12), (2**40, 2**20), (-12,), (13,)], ids=lambda dims: f"{dims}"
)
def test_what_is_no_message_ends_the_wait(dims: tuple[int, ...]) -> None:
    """No more is set aside for it than has come."""
    one, other = socket.socketpair()
    one.settimeout(2.0)
    head, _, data = packed(Message(Kind.OUTPUT, AT, tensor=torch.zeros(3)))
    head = bytes(head)
    head = head[:2] + bytes([len(dims)]) + head[3:]
    with other, TcpPost(0, {1: one}) as post:
        other.sendall(head + struct.pack(f"<{len(dims)}q", *dims) + data)
        post.wait(lambda: False)
        assert "this is no message of a rank" in post.mail.lost


def test_strangers_at_the_port_are_no_ranks() -> None:
    """They send nothing, too little, too much, or end at once."""
    secret = bytes(range(16))
    for sent, rank in (
        (b"", None),
        (b"GET / HTTP/1.1", None),
        (b"x" * 1000, None),
        (secret, None),
        (secret + b"\0\0\0\x02", 2),
    ):
        one, other = socket.socketpair()
        with one, other:
            other.sendall(sent)
            other.shutdown(socket.SHUT_WR)
            assert wire.greeted_by(one, secret) == rank


def test_a_stranger_who_says_nothing_is_not_waited_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(wire, "GREETING_SECONDS", 0.05)
    one, other = socket.socketpair()
    with one, other:
        assert wire.greeted_by(one, bytes(16)) is None


@pytest.mark.parametrize(
    ("rank", "master"), [(0, "no.such.host.invalid"), (1, "127.0.0.1"), (0, "a..b")]
)
def test_a_first_rank_that_is_not_there_is_one_sentence(
    rank: int, master: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(joining, "JOIN_SECONDS", 0.1)
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]  # free again after this
    with pytest.raises(RanksError, match=f"rank {rank} of 2 cannot join .* unset RANK"):
        joining.join(joining.RankEnvironment(rank, 2, master, port))

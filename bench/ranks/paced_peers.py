"""Sockets between ranks that send no faster than a network of a given speed."""

from __future__ import annotations

import socket
import time
from typing import Any

from penstock.offload.ranks.joining import RankEnvironment, connect
from penstock.offload.ranks.tcp_post import TcpPost

_PIECE = 64 << 10


class PacedSocket:
    """`there`, which takes no more than `rate` bytes a second of what is sent. The
    thread that sends waits, and uses no core meanwhile."""

    def __init__(self, there: socket.socket, rate: float) -> None:
        self._there = there
        self._rate = rate
        self._free = 0.0
        """When all that was sent so far is through."""

    def send(self, data: Any) -> int:
        start = max(self._free, time.perf_counter())
        num = self._there.send(memoryview(data)[:_PIECE])
        self._free = start + num / self._rate
        time.sleep(max(0.0, self._free - time.perf_counter()))
        return num

    def __getattr__(self, name: str) -> Any:
        return getattr(self._there, name)


def join_paced(where: RankEnvironment, rate: float) -> TcpPost:
    """As `join`, with a link of `rate` bytes a second to each other rank."""
    peers, store = connect(where)
    paced: Any = {rank: PacedSocket(there, rate) for rank, there in peers.items()}
    return TcpPost(where.rank, paced, store)

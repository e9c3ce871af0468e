"""The ranks that torchrun has started, as workers of a job whose ranks gather weights.

Rank 0 reads the rows and writes the results. It computes in a process that it starts;
the other ranks get rows over a connection, as the workers of one machine do.
"""

import os
import socket
from contextlib import suppress
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from typing import Any

from ...io.closing import Closing
from .joining import RankEnvironment, connect


@dataclass(frozen=True)
class RemoteRank:
    """Another rank, which waits for its work: like a process of `multiprocessing`."""

    rank: int
    connection: Connection
    exitcode: int | None = None

    def tell(self, work: Any) -> None:
        """Tells it what to do."""
        self.connection.send(work)

    def start(self) -> None:
        """Does nothing: it has begun."""

    def kill(self) -> None:
        """Ends its work: it ends when the connection does."""
        with suppress(OSError), _socket_of(self.connection) as there:
            there.shutdown(socket.SHUT_RDWR)

    def join(self) -> None:
        """Does nothing: it ends by itself."""

    def close(self) -> None:
        self.connection.close()


class RemoteRanks(Closing):
    """The other ranks, as the first one, which is `where`, sees them."""

    def __init__(self, where: RankEnvironment) -> None:
        peers, self._store = connect(where)
        self.where = replace(where, has_store=True)
        """The environment of the process that computes for the first rank."""
        self.ranks = [
            RemoteRank(rank, connection_of(peer)) for rank, peer in peers.items()
        ]

    def close(self) -> None:
        for one in self.ranks:
            one.close()


def connection_of(there: socket.socket) -> Connection:
    """A connection over the socket `there`, which it closes."""
    there.settimeout(None)
    return Connection(there.detach())


def _socket_of(connection: Connection) -> socket.socket:
    return socket.socket(fileno=os.dup(connection.fileno()))

"""The ranks that torchrun has started, as workers of a job whose ranks gather weights.

Rank 0 reads the rows and writes the results. It computes in a process that it starts;
the other ranks get rows over a connection, as the workers of one machine do.
"""

import io
import os
import pickle
import socket
import sys
from collections.abc import Collection, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from enum import EnumType
from multiprocessing.connection import Connection
from typing import Any
from zoneinfo import ZoneInfo

from ...io.closing import Closing
from ...io.errors import RanksError
from .joining import RankEnvironment, connect

_EXPECTED = frozenset(
    {
        __name__.partition(".")[0],
        *("builtins", "collections", "datetime", "decimal", "pathlib", "uuid"),
        "zoneinfo",
    }
)
"""The packages of whose classes work, rows and results are made."""


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
    """The other ranks, as the first one, which is `where`, sees them. All have the
    `same` options."""

    def __init__(
        self, where: RankEnvironment, same: Mapping[str, str] | None = None
    ) -> None:
        peers, self._store = connect(where, way="rows", same=same)
        self.where = replace(where, has_store=True)
        """The environment of the process that computes for the first rank."""
        self.ranks = [
            RemoteRank(rank, connection_of(peer)) for rank, peer in peers.items()
        ]

    def close(self) -> None:
        for one in self.ranks:
            one.close()


class RankConnection(Connection):
    """A connection to a rank that may be on another machine: it brings values, no code.
    A value may have classes of `kinds`, beside those of Penstock."""

    def __init__(self, descriptor: int, kinds: Collection[type] = ()) -> None:
        super().__init__(descriptor)
        self._kinds = kinds

    def recv(self) -> Any:
        """The next value. Raises EOFError, OSError, and RanksError for what is none."""
        content = self.recv_bytes()
        try:
            return _Values(content, self._kinds).load()
        except Exception as error:  # whatever the other end has sent
            raise RanksError(
                "another rank has sent what is no value of a job "
                f"({str(error) or type(error).__name__}): give all ranks the same "
                "versions of Python and penstock"
            ) from None


class _Values(pickle.Unpickler):
    """Reads a pickled value. It imports nothing and calls no functions: the pickle may
    name classes only, those of `_EXPECTED`, of errors and of `kinds`."""

    def __init__(self, content: bytes, kinds: Collection[type]) -> None:
        super().__init__(io.BytesIO(content))
        self._kinds = kinds

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("builtins", "getattr"):
            return _part_of
        if module in sys.modules and "." not in name:
            found = super().find_class(module, name)
            if isinstance(found, type) and (
                module.partition(".")[0] in _EXPECTED
                or issubclass(found, BaseException)
                or found in self._kinds
            ):
                return found
        raise pickle.UnpicklingError(f"{module}.{name} is not expected")


def _part_of(kind: Any, name: str) -> Any:
    """What Python names by `getattr`: members of an Enum, and time zones."""
    if isinstance(kind, EnumType):
        return kind[name]
    if kind is ZoneInfo and name == "_unpickle":
        return ZoneInfo._unpickle  # type: ignore[attr-defined]
    raise pickle.UnpicklingError(f"{name!r} is not expected")


def connection_of(there: socket.socket, kinds: Collection[type] = ()) -> RankConnection:
    """A connection over the socket `there`, which it closes."""
    there.settimeout(None)
    return RankConnection(there.detach(), kinds)


def _socket_of(connection: Connection) -> socket.socket:
    return socket.socket(fileno=os.dup(connection.fileno()))

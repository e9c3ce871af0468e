"""Connects the ranks that torchrun, or `--ranks`, has started."""

import json
import logging
import os
import secrets
import socket
import time
from collections.abc import Callable, Collection, Mapping
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from datetime import timedelta
from functools import partial

from torch.distributed import (  # type: ignore[attr-defined]
    DistError,
    PrefixStore,
    Store,
    TCPStore,
)

from ...io.errors import RanksError, UsageError
from .sameness import check_told
from .silence import SILENT_SECONDS
from .tcp_post import TcpPost
from .wire import TOKEN_BYTES, greeted_by

JOIN_SECONDS = 120.0
"""How long ranks wait for each other at the start."""
_NEEDED = "RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"
_CHECK_SECONDS, _POLL_SECONDS = 0.5, 0.02
LOCAL = "127.0.0.1"
NOTICE_SECONDS = 10.0
"""After this long, it is said which ranks are waited for."""
_log = logging.getLogger("penstock")


@dataclass(frozen=True, slots=True)
class RankEnvironment:
    """Which rank this process is, and where the first one is found."""

    rank: int
    num_ranks: int
    master: str
    port: int
    num_local: int = 1
    """The ranks of this machine."""
    local_rank: int = 0
    """The number of this one among them."""
    has_store: bool = False
    """Whether torchrun keeps a store at `port`; else the first rank does."""
    attempt: str = "0"
    """Differs each time torchrun starts the ranks: its store may have older entries."""

    @classmethod
    def of(cls, variables: Mapping[str, str] = os.environ) -> "RankEnvironment":
        """What torchrun sets; one rank, at no port, where nothing of it is set. Raises
        UsageError if only a part is."""
        if not any(name in variables for name in _NEEDED):
            return cls(0, 1, LOCAL, 0)
        missing = [name for name in _NEEDED if name not in variables]
        if missing:
            given = [name for name in _NEEDED if name in variables]
            raise UsageError(
                f"{', '.join(given)} set in the environment, and not "
                f"{', '.join(missing)}: start all ranks with torchrun, which sets "
                f"{', '.join(_NEEDED)}, or unset them for a process alone"
            )
        try:
            rank, num = int(variables["RANK"]), int(variables["WORLD_SIZE"])
            port = int(variables["MASTER_PORT"])
            local = int(variables.get("LOCAL_WORLD_SIZE", "1"))
            here = int(variables.get("LOCAL_RANK", rank % max(local, 1)))
        except ValueError as error:
            raise UsageError(
                "RANK, WORLD_SIZE, MASTER_PORT, LOCAL_RANK and LOCAL_WORLD_SIZE are "
                f"numbers: {error}"
            ) from None
        if not 0 <= rank < num:
            raise UsageError(f"RANK is {rank}, and WORLD_SIZE {num}")
        if not 0 < port < 2**16:
            raise UsageError(f"MASTER_PORT is {port}: a port is from 1 to {2**16 - 1}")
        if not 0 < local <= num:
            raise UsageError(
                f"LOCAL_WORLD_SIZE is {local}: it is from 1 to WORLD_SIZE ({num})"
            )
        if here < 0 or ("LOCAL_WORLD_SIZE" in variables and here >= local):
            raise UsageError(f"LOCAL_RANK is {here}, and LOCAL_WORLD_SIZE {local}")
        if not (master := variables["MASTER_ADDR"]):
            raise UsageError("MASTER_ADDR is empty: it is the first rank's address")
        agent = variables.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
        attempt = variables.get("TORCHELASTIC_RESTART_COUNT", "0")
        return cls(rank, num, master, port, local, here, agent, attempt)

    @classmethod
    def found(cls) -> "RankEnvironment | None":
        """What torchrun sets; None where it did not start this process. Raises
        UsageError if only a part of it is set. An address and a port alone, or a size
        of one, may be there for other programs."""
        is_one = os.environ.get("WORLD_SIZE", "1") == "1"
        return None if is_one and "RANK" not in os.environ else cls.of()

    @property
    def is_alone(self) -> bool:
        return self.num_ranks == 1


def local_store() -> TCPStore:
    """A store in this process, at a port of this machine that is free."""
    limit = timedelta(seconds=JOIN_SECONDS)
    return TCPStore(LOCAL, 0, None, True, timeout=limit, wait_for_workers=False)


def join(
    where: RankEnvironment,
    *,
    store: TCPStore | None = None,
    check: Callable[[], None] = lambda: None,
    same: Mapping[str, str] | None = None,
) -> TcpPost:
    """Connects this rank with all others, by the `store` at `where`. Raises RanksError
    if they do not come, what `check` raises, which is called meanwhile, and UsageError
    if they have not the `same` options."""
    peers, store = connect(where, store=store, check=check, same=same)
    return TcpPost(where.rank, peers, store)


def connect(
    where: RankEnvironment,
    *,
    store: TCPStore | None = None,
    check: Callable[[], None] = lambda: None,
    way: str = "messages",
    same: Mapping[str, str] | None = None,
) -> tuple[dict[int, socket.socket], TCPStore]:
    """Like `join`: a socket to each other rank, and the store, which the first rank may
    have to keep. Raises UsageError if others join for another `way` of sharing, or with
    another value in `same`, the options of a job."""
    notice = _Notice(where)
    with ExitStack() as stack:
        try:
            if store is None:
                _reach(where, check, notice)
            store = store or TCPStore(
                where.master,
                where.port,
                None,
                where.rank == 0 and not where.has_store,
                timeout=timedelta(seconds=JOIN_SECONDS),
                wait_for_workers=False,
                multi_tenant=True,
            )
            number = store.add(f"penstock/{where.attempt}/joins/{where.rank}", 1)
            prefixed = PrefixStore(f"penstock/{where.attempt}/{number}", store)
            told = json.dumps([way, dict(same or {})], sort_keys=True)
            peers = _connect(prefixed, where, stack, check, notice, told)
        except (DistError, OSError, RuntimeError, UnicodeError) as error:
            reason = (str(error) or type(error).__name__).splitlines()[0]
            if "EADDRINUSE" in reason:
                raise RanksError(
                    f"rank {where.rank} of {where.num_ranks} cannot listen at "
                    f"{where.master}:{where.port}: another program has that port; give "
                    "all ranks another one (MASTER_PORT, torchrun's --master-port)"
                ) from None
            raise RanksError(
                f"rank {where.rank} of {where.num_ranks} cannot join the others at "
                f"{where.master}:{where.port}: {reason}; start all ranks within "
                f"{JOIN_SECONDS:.0f} seconds, or unset RANK and WORLD_SIZE for a "
                "process alone"
            ) from None
        stack.pop_all()
    return peers, store


class _Notice:
    """Says once which ranks are waited for, if they do not come for some seconds."""

    def __init__(self, where: RankEnvironment) -> None:
        self._where = where
        self._at = time.monotonic() + NOTICE_SECONDS
        self._is_said = False

    def waits_for(self, ranks: Collection[int]) -> None:
        """Called again and again while `ranks` are missing."""
        if self._is_said or time.monotonic() < self._at:
            return
        self._is_said = True
        where, names = self._where, ", ".join(map(str, sorted(ranks)))
        _log.warning(
            "waiting for rank%s %s of %d at %s, for at most %.0f seconds",
            "s" if len(ranks) > 1 else "",
            names,
            where.num_ranks,
            f"{where.master}:{where.port}",
            JOIN_SECONDS,
        )


def _reach(where: RankEnvironment, check: Callable[[], None], notice: _Notice) -> None:
    """Waits until the store answers, or the address is known on the rank that keeps it.
    Raises OSError if it is not for long: torch would retry longer, and print stacks."""
    keeps_store = where.rank == 0 and not where.has_store
    end = time.monotonic() + JOIN_SECONDS
    while True:
        check()
        left = max(end - time.monotonic(), _CHECK_SECONDS)
        try:
            if keeps_store:
                socket.getaddrinfo(where.master, where.port)
            else:
                socket.create_connection((where.master, where.port), left).close()
            return
        except OSError:
            if time.monotonic() > end:
                raise
        notice.waits_for([0])
        time.sleep(_CHECK_SECONDS)


def _connect(
    store: Store,
    where: RankEnvironment,
    stack: ExitStack,
    check: Callable[[], None],
    notice: _Notice,
    told: str,
) -> dict[int, socket.socket]:
    """A socket to each other rank: each connects to those below it."""
    token = secrets.token_bytes(TOKEN_BYTES).hex()
    if not where.rank:
        store.set("token", token)
    secret = bytes.fromhex(_value(store, "token", lambda: notice.waits_for([0])))
    family, here = _own_address(where)
    listener = socket.create_server((here, 0), family=family, backlog=where.num_ranks)
    with listener:
        listener.settimeout(_CHECK_SECONDS)
        store.set(f"told/{where.rank}", told)
        store.set(f"at/{where.rank}", f"{here} {listener.getsockname()[1]}")
        peers: dict[int, socket.socket] = {}
        for peer in range(where.rank):
            at = _value(store, f"at/{peer}", partial(notice.waits_for, [peer]))
            host, port = at.split()
            there = socket.create_connection((host, int(port)), JOIN_SECONDS)
            peers[peer] = stack.enter_context(there)
            there.sendall(secret + where.rank.to_bytes(4, "big"))
        end = time.monotonic() + JOIN_SECONDS
        missing = set(range(where.rank + 1, where.num_ranks))
        while missing:
            there = _accepted(listener, check, end, partial(notice.waits_for, missing))
            greeted = greeted_by(there, secret)
            if greeted is None or greeted not in missing:
                there.close()  # somebody else
                continue
            missing.remove(greeted)
            peers[greeted] = stack.enter_context(there)
    for peer, there in peers.items():
        check_told(peer, store.get(f"told/{peer}").decode(), where.rank, told)
        there.settimeout(SILENT_SECONDS)
        there.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return peers


def _accepted(
    listener: socket.socket,
    check: Callable[[], None],
    end: float,
    notice: Callable[[], None],
) -> socket.socket:
    """The next connection. Raises TimeoutError if there is none until `end`."""
    while time.monotonic() < end:
        check()
        with suppress(TimeoutError):
            return listener.accept()[0]
        notice()
    raise TimeoutError("timed out")


def _value(store: Store, key: str, notice: Callable[[], None]) -> str:
    """The value of `key` once another rank has set it. Raises DistError if none does
    for long; `notice` is called meanwhile."""
    end = time.monotonic() + JOIN_SECONDS
    while time.monotonic() < end and not store.check([key]):
        notice()
        time.sleep(_POLL_SECONDS)
    return store.get(key).decode()


def _own_address(where: RankEnvironment) -> tuple[int, str]:
    """The address under which the master, and so the others, reach this machine."""
    found = socket.getaddrinfo(where.master, where.port, type=socket.SOCK_DGRAM)
    family, kind, protocol, _, address = found[0]
    with socket.socket(family, kind, protocol) as probe:
        probe.connect(address)
        return family, str(probe.getsockname()[0])

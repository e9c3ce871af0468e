"""A worker for tests. It imports no torch, so its process starts at once."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from multiprocessing.connection import Connection
from pathlib import Path

from penstock.io.errors import UsageError
from penstock.offload.files.parts import OutputPart


def _parts(link: Connection) -> Iterator[OutputPart]:
    while True:
        link.send(("want",))
        part = link.recv()
        if part is None:
            return
        yield part


def _lines(part: OutputPart) -> list[bytes]:
    return [b"%d\n" % number for number, _ in part.numbered()]


def _end(link: Connection) -> None:
    link.send(("computed", "all"))
    link.send(("bye",))
    link.recv()


def works(link: Connection) -> None:
    link.send(("ready",))
    for part in _parts(link):
        link.send(("log", 30, "said by each"))
        link.send(("look", len(part.rows)))
        link.send(("done", part.number, _lines(part), 1, "some"))
    _end(link)


def dies_once(
    link: Connection,
    marker: Path,
    *,
    speaks: bool = False,
    number: int = signal.SIGKILL,
) -> None:
    """With its second part, of which nothing was handed in, or half of a message."""
    link.send(("ready",))
    for part in _parts(link):
        if part.number and not marker.exists():
            marker.touch()
            if speaks:
                os.write(link.fileno(), (100).to_bytes(4, "big") + b"half")
            os.kill(os.getpid(), number)
        link.send(("done", part.number, _lines(part), 0, "some"))
    _end(link)


def stops_itself(link: Connection) -> None:
    """With its second part; then it is done."""
    link.send(("ready",))
    for part in _parts(link):
        if part.number == 1:
            os.kill(os.getpid(), signal.SIGSTOP)
        link.send(("done", part.number, _lines(part), 0, "some"))
    _end(link)


def dies_of(link: Connection, number: int, log: Path) -> None:
    """Whenever it has this part; -1: before it has any."""
    with log.open("a") as file:
        file.write(f"{os.getpid()}\n")
    if number < 0:
        os._exit(3)
    for part in _parts(link):
        if part.number == number:
            os._exit(3)
        link.send(("done", part.number, _lines(part), 0, "some"))
    _end(link)


def fails(link: Connection) -> None:
    for _ in _parts(link):
        link.send(("failed", UsageError("it cannot be done")))
    _end(link)


def waits(link: Connection) -> None:
    """For ever, with the first part that it gets."""
    for _ in _parts(link):
        link.recv()

"""A rank that says nothing is lost, unless its process runs on a busy machine."""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
from collections.abc import Iterator

import psutil
import pytest

from penstock.offload.ranks import silence
from penstock.offload.ranks.silence import Silence

CHILD = """
import socket, sys, time
there = socket.create_connection(("127.0.0.1", int(sys.argv[1])))
time.sleep(300)
"""


@pytest.fixture
def silent() -> Iterator[tuple[socket.socket, subprocess.Popen[bytes]]]:
    """A connection to a process that says nothing."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        child = subprocess.Popen([sys.executable, "-c", CHILD, str(port)])
        there, _ = server.accept()
        with there, child:
            yield there, child
            child.kill()


@pytest.mark.slow
def test_a_process_that_runs_is_waited_for_unless_it_is_stopped(
    silent: tuple[socket.socket, subprocess.Popen[bytes]],
    caplog: pytest.LogCaptureFixture,
) -> None:
    there, child = silent
    found = Silence(1, there)
    for _ in range(2):
        found.bear(TimeoutError())
    assert [r.message for r in caplog.records if "its process runs" in r.message]
    assert len(caplog.records) == 1
    child.send_signal(signal.SIGSTOP)
    while psutil.Process(child.pid).status() != psutil.STATUS_STOPPED:
        pass
    with pytest.raises(TimeoutError):
        found.bear(TimeoutError())


@pytest.mark.slow
def test_no_process_is_waited_for_without_an_end(
    silent: tuple[socket.socket, subprocess.Popen[bytes]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(silence, "BUSY_SECONDS", -1.0)
    with pytest.raises(TimeoutError):
        Silence(1, silent[0]).bear(TimeoutError())


def test_who_is_not_on_this_machine_is_not_waited_for() -> None:
    one, other = socket.socketpair()
    with one, other, pytest.raises(TimeoutError):
        Silence(1, one).bear(TimeoutError())

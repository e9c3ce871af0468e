"""A Ray cluster of several node processes on this machine, for tests and benchmarks."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence

HOST = "127.0.0.1"
ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "1",
    "RAY_enable_worker_prestart": "0",  # none that would import and then do nothing
    "RAY_prestart_worker_first_driver": "0",
    "RAY_AUTH_MODE": "token",  # or anybody who reaches the port may run code here
    "RAY_AUTH_TOKEN": secrets.token_hex(32),
}
"""The environment of all processes of the cluster, including those that connect to
it."""
COMPUTES = "computes"
"""A resource of which each node has one: for actors that must not share a node."""


@contextlib.contextmanager
def ray_nodes(cores: Sequence[int]) -> Iterator[str]:
    """Starts a node on each of `cores` (bound to it, so that they are like machines)
    and yields the cluster's address. Other clusters of this machine are left alone."""
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        port = probe.getsockname()[1]
    address = f"{HOST}:{port}"
    folder = tempfile.mkdtemp(prefix="ray-")  # names of sockets have to be short
    with contextlib.ExitStack() as stack:
        stack.callback(shutil.rmtree, folder, ignore_errors=True)
        for number, core in enumerate(cores):
            role = (
                [
                    *("--head", f"--port={port}", f"--temp-dir={folder}"),
                    *("--include-dashboard=false", "--no-monitor"),
                ]
                if number == 0
                else [f"--address={address}"]
            )
            node = _start(role, core)
            stack.callback(_stop, node)
            assert node.stdout is not None
            for line in node.stdout:
                if "Ray runtime started" in line:
                    break
            else:
                raise RuntimeError("a Ray node did not start")
        yield address


def _start(arguments: list[str], core: int) -> subprocess.Popen[str]:
    ray = (sys.executable, "-m", "ray.scripts.scripts")
    return subprocess.Popen(
        [
            *("taskset", "-c", str(core), *ray, "start", *arguments),
            f"--node-ip-address={HOST}",
            "--num-cpus=2",  # one that computes, and one for reading and writing
            f"--resources={json.dumps({COMPUTES: 1})}",
            "--object-store-memory=80000000",
            "--disable-usage-stats",
            "--include-log-monitor=False",
            "--block",
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, **ENVIRONMENT},
    )


def _stop(node: subprocess.Popen[str]) -> None:
    node.terminate()  # it ends the processes of its node
    try:
        node.communicate(timeout=30)
    except subprocess.TimeoutExpired:
        node.kill()
        node.communicate()

"""What all tests share: one thread, no progress bars, and a watch on what is left."""

from __future__ import annotations

import atexit
import gc
import mmap
import os
import shutil
import signal
import sys
import tempfile
import threading
import weakref
from collections.abc import Generator, Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar, Protocol

# Before anything imports them.
os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
# What is remembered of this computer's drives is no business of tests.
os.environ["XDG_CACHE_HOME"] = tempfile.mkdtemp(prefix="penstock-tests-")

# Tests take helpers from each other.
sys.path += [
    str(path) for path in Path(__file__).parent.rglob("[a-z]*") if path.is_dir()
]

import pytest
import torch
from hypothesis import HealthCheck, settings

import forked_python
import kernel_aio
from checkpoints import random_tensor, write_checkpoint
from sim_child import pytest_runtest_logreport, pytest_runtest_protocol, simgpu

__all__ = ["pytest_runtest_logreport", "pytest_runtest_protocol", "simgpu"]

# Nor is what it can do: jobs choose the same on every computer.
MACHINE = """
name: a computer of tests
source: tests
host_memory: 16GiB
host_bandwidth: 10GB
matmul:
  float32: {1: 2000000000, 512: 100000000000}
  bfloat16: {1: 4000000000, 512: 400000000000}
  float16: {1: 4000000000, 512: 400000000000}
disk: {bandwidth: {threads: 1GB, libaio: 1GB}}
"""
_CACHE = Path(os.environ["XDG_CACHE_HOME"]) / "penstock"
_CACHE.mkdir()
(_CACHE / "machine.yaml").write_text(MACHINE)

atexit.register(shutil.rmtree, os.environ["XDG_CACHE_HOME"], ignore_errors=True)
torch.set_num_threads(1)
# A shell ignores SIGINT for background jobs; tests that stop a job by it would fail.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

settings.register_profile(
    "default",
    deadline=None,
    max_examples=50,
    suppress_health_check=[
        HealthCheck.function_scoped_fixture,  # no_leaks watches all examples as one
        HealthCheck.too_slow,
    ],
)
settings.register_profile("ci", settings.get_profile("default"), derandomize=True)
settings.load_profile("ci" if os.environ.get("CI") else "default")


class _WatchedMap(mmap.mmap):
    """A mapping that is counted for as long as it is mapped."""

    alive: ClassVar[weakref.WeakSet[_WatchedMap]] = weakref.WeakSet()

    def __new__(cls, *args: Any, **kwargs: Any) -> _WatchedMap:
        self = super().__new__(cls, *args, **kwargs)
        cls.alive.add(self)
        return self


def mapped_bytes() -> int:
    """Bytes mapped by this process's `mmap.mmap` objects made under `no_leaks`: those
    not closed, or closed by nobody yet since a view of them lives."""
    return sum(len(found) for found in list(_WatchedMap.alive) if not found.closed)


def _descriptors() -> dict[int, str]:
    found = {}
    for name in os.listdir("/proc/self/fd"):
        try:
            found[int(name)] = os.readlink(f"/proc/self/fd/{name}")
        except OSError:
            continue  # the one that listed the folder
    return found


def _threads() -> set[threading.Thread]:
    return {t for t in threading.enumerate() if t.name.startswith("penstock-")}


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--whole",
        action="store_true",
        help="run whole products (every model on every tier), not a share of them",
    )
    parser.addoption(
        "--libaio",
        choices=kernel_aio.CHOICES,
        default="auto",
        help="what `import libaio` finds: the installed package, the kernel's calls "
        "behind its interface, or nothing (auto: the first of these that works)",
    )


_LIBAIO = pytest.StashKey[str]()


@pytest.hookimpl(optionalhook=True)  # children of tests have no xdist
def pytest_xdist_auto_num_workers() -> int:
    """The processes of `-n auto`: one more than there are cores, since tests wait for a
    third of their time; at most five."""
    return min(5, len(os.sched_getaffinity(0)) + 1)


def pytest_configure(config: pytest.Config) -> None:
    # Before modules of tests look which readers there are.
    config.stash[_LIBAIO] = kernel_aio.install(config.getoption("--libaio"))


def pytest_report_header(config: pytest.Config) -> str:
    return f"libaio: {config.stash[_LIBAIO]}"


def _place(item: pytest.Item) -> int:
    """The order of a test if several processes share all tests: the longest first."""
    if "all_objects" in getattr(item, "fixturenames", ()):
        return 0
    return 1 if item.get_closest_marker("slow") else 2


def pytest_collection_modifyitems(
    config: pytest.Config, items: list[pytest.Item]
) -> None:
    if "PYTEST_XDIST_WORKER" in os.environ:
        # Short ones last, which can be shared out evenly when others have ended; who
        # looks at all objects first, before models have made many.
        items.sort(key=_place)
    if config.getoption("--whole"):
        return
    left_out = [item for item in items if item.get_closest_marker("whole")]
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if not item.get_closest_marker("whole")]


def pytest_collection_finish() -> None:
    # What is there now stays. The collector need not walk it in each test.
    gc.collect()
    gc.freeze()


@pytest.fixture
def few_objects(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets a micro-batch's tensors leave the device, for which the library asks the
    collector who refers to them, and does not believe it where anything is frozen. Here
    that is right: torch, pytest and modules of tests refer to nothing of the test."""
    monkeypatch.setattr(gc, "get_freeze_count", lambda: 0)


@pytest.fixture
def all_objects() -> Iterator[None]:
    """Like `few_objects`, but the collector looks at all objects, which takes long."""
    gc.unfreeze()
    yield
    gc.collect()
    gc.freeze()


_HAS_FAILED = pytest.StashKey[bool]()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    if report.when == "call":
        item.stash[_HAS_FAILED] = report.failed
    return report


@pytest.fixture
def no_leaks(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> Iterator[None]:
    """Fails a test that leaves a thread, a file descriptor or a mapping behind.

    What only waits for the garbage collector is no leak, but is collected here. A test
    that has failed already is left in peace: its traceback keeps what it held.
    """
    monkeypatch.setattr(mmap, "mmap", _WatchedMap)
    threads, descriptors, nbytes = _threads(), _descriptors(), mapped_bytes()

    def left() -> dict[str, Any]:
        now = _descriptors().items() - descriptors.items()
        return {
            "threads": {thread.name for thread in _threads() - threads},
            "descriptors": {number: target for number, target in now},
            "mapped bytes": max(mapped_bytes() - nbytes, 0),
        }

    yield
    if request.node.stash.get(_HAS_FAILED, False):
        return
    for generation in (1, 2):  # the old ones take long, and are rarely needed
        if any(left().values()):
            gc.collect(generation)
    found = {what: value for what, value in left().items() if value}
    assert not found, f"left behind: {found}"


@pytest.fixture(scope="session")
def own_processes() -> None:
    """Starts what `forked_python.run` needs, so that no test leaves it behind."""
    forked_python.ensure_running()


class TinyCheckpoint(Protocol):
    """Writes random tensors of these dtypes and shapes; returns the folder."""

    def __call__(
        self,
        tensors: Mapping[str, tuple[torch.dtype, tuple[int, ...]]],
        *,
        num_shards: int = 1,
    ) -> Path: ...


@pytest.fixture
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> TinyCheckpoint:
    """Writes checkpoints of random bits, each into a folder of its own."""

    def write(
        tensors: Mapping[str, tuple[torch.dtype, tuple[int, ...]]],
        *,
        num_shards: int = 1,
    ) -> Path:
        made = {
            name: random_tensor(dtype, shape, seed=seed)
            for seed, (name, (dtype, shape)) in enumerate(tensors.items())
        }
        folder = tmp_path_factory.mktemp("checkpoint")
        return write_checkpoint(folder, made, num_shards=num_shards)

    return write

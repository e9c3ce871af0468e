"""A wrapped module's weights: written whole or not at all, and removed in the end."""

from __future__ import annotations

import contextlib
import fcntl
import os
import resource
import shutil
import signal
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.utils import prune

import forked_python
import penstock
from nets import Net, batches, make, same, serially
from penstock import PenstockError, Policy
from penstock.io.checkpoint.index import SINGLE_FILE
from penstock.io.errors import OutputError
from penstock.offload.engine import engine
from penstock.offload.engine.tiers import Tiers
from penstock.offload.weights.binding import Binding
from penstock.offload.weights.spill_folder import SpillFolder

pytestmark = pytest.mark.usefixtures("own_processes", "no_leaks")


@contextmanager
def files_end_at(nbytes: int) -> Iterator[None]:
    """The system refuses to write files longer than that, as a full disk does."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (nbytes, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)


def policy(cache: Path) -> Policy:
    return Policy(device_memory="1MiB", io={"cache": cache})


def test_the_weights_lie_in_the_cache_while_they_are_streamed(tmp_path: Path) -> None:
    cache = tmp_path / "made" / "cache"
    net = make(Net)
    expected = serially(net, batches(2))
    penstock.wrap(net, policy(cache))
    (folder,) = cache.glob("wrapped-*")
    assert {path.name for path in folder.iterdir()} == {SINGLE_FILE, "in-use"}
    assert same(serially(net, batches(2)), expected)
    penstock.unwrap(net)
    assert list(cache.glob("wrapped-*")) == []


def test_a_full_disk_is_one_error_at_once_and_changes_nothing(tmp_path: Path) -> None:
    net = make(Net)
    expected = serially(net, batches(2))
    start = time.perf_counter()
    with files_end_at(1000), pytest.raises(OutputError, match=r"io\.cache") as caught:
        penstock.wrap(net, policy(tmp_path))
    assert time.perf_counter() - start < 1.0
    assert str(tmp_path) in str(caught.value)
    assert os.listdir(tmp_path) == []
    assert same(serially(net, batches(2)), expected)
    penstock.wrap(net, policy(tmp_path))  # there is room again
    assert same(serially(net, batches(2)), expected)
    penstock.unwrap(net)


def test_a_cache_that_cannot_be_made_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match=r"set io\.cache"):
        penstock.wrap(make(Net), policy(tmp_path / "file" / "cache"))


def test_what_a_killed_process_has_left_is_removed(tmp_path: Path) -> None:
    code = f"""
        import os, signal, torch, penstock
        from penstock import PenstockError, Policy
        net = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.Linear(64, 64))
        policy = Policy(device_memory="1MiB", io={{"cache": {str(tmp_path)!r}}})
        penstock.wrap(net, policy)
        os.kill(os.getpid(), signal.SIGKILL)
    """
    done = forked_python.run("-c", textwrap.dedent(code))
    assert done.returncode == -signal.SIGKILL
    (left,) = tmp_path.glob("wrapped-*")
    one, other = make(Net), make(Net)
    penstock.wrap(one, policy(tmp_path))
    assert not left.exists()
    penstock.wrap(other, policy(tmp_path))  # the first one's stays: it is in use
    assert len(list(tmp_path.glob("wrapped-*"))) == 2
    penstock.unwrap(one)
    penstock.unwrap(other)


TIGHT = {"device_memory": 3 * 8192, "resident_below": 1}
HOST = {**TIGHT, "host_memory": "1MiB"}


def taken_out(net: Net) -> None:
    del net.blocks[1]


def moved(net: Net) -> None:
    net.blocks[1], net.blocks[2] = net.blocks[2], net.blocks[1]


def pruned(net: Net) -> None:
    prune_one: Any = prune.random_unstructured
    prune_one(net.blocks[1].linear, "weight", amount=0.0)


@pytest.mark.parametrize("change", [taken_out, moved, pruned])
@pytest.mark.parametrize("values", [TIGHT, HOST], ids=["tight", "host"])
def test_unwrap_puts_weights_back_into_the_modules_that_are_there_now(
    change: Callable[[Net], None], values: dict[str, Any], tmp_path: Path
) -> None:
    net, whole = make(Net), make(Net)
    change(whole)
    penstock.wrap(net, Policy(**values, io={"cache": tmp_path}))
    with contextlib.suppress(PenstockError):  # of pruning what is not there
        change(net)
    penstock.unwrap(net)
    assert same(serially(net, batches(2)), serially(whole, batches(2)))
    assert list(tmp_path.glob("wrapped-*")) == []


def by_copy(weight: torch.Tensor) -> None:
    with torch.no_grad():
        weight.copy_(torch.ones_like(weight))


def by_numpy(weight: torch.Tensor) -> None:
    weight.detach().numpy()[:] = 1.0


@pytest.mark.parametrize(
    ("write", "dtype"), [(by_copy, "auto"), (by_copy, "bfloat16"), (by_numpy, "auto")]
)
def test_what_is_written_to_a_weight_in_memory_is_there_after_unwrap(
    write: Callable[[torch.Tensor], None], dtype: str, tmp_path: Path
) -> None:
    net, whole = make(Net), make(Net)
    penstock.wrap(net, Policy(dtype=dtype, **HOST, io={"cache": tmp_path}))
    for each in (net, whole):
        write(each.blocks[1].linear.weight)
    penstock.unwrap(net)
    assert same(serially(net, batches(2)), serially(whole, batches(2)))


@pytest.mark.parametrize(
    "where",
    [(engine.Engine, "close"), (Tiers, "close"), (Binding, "unbind_all")],
    ids=["first", "middle", "last"],
)
def test_an_unwrap_that_was_interrupted_can_be_done_again(
    where: tuple[type, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    net = make(Net)
    expected = serially(net, batches(2))
    penstock.wrap(net, Policy(**HOST, io={"cache": tmp_path}))

    def interrupted(self: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(*where, interrupted)
        with pytest.raises(KeyboardInterrupt):
            penstock.unwrap(net)
    penstock.unwrap(net)
    assert same(serially(net, batches(2)), expected)
    assert type(net) is Net
    assert list(tmp_path.glob("wrapped-*")) == []


def test_a_wrap_that_is_interrupted_at_its_end_changes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    net = make(Net)
    expected = serially(net, batches(2))

    def interrupted(*args: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("penstock.offload.model.Life", interrupted)
        with pytest.raises(KeyboardInterrupt):
            penstock.wrap(net, policy(tmp_path))
    assert same(serially(net, batches(2)), expected)
    assert type(net) is Net
    assert list(tmp_path.glob("wrapped-*")) == []


def test_a_sweep_that_ends_after_unwrap_leaves_the_weights_where_they_are(
    tmp_path: Path,
) -> None:
    net = make(Net)
    expected = serially(net, batches(2))
    penstock.wrap(net, Policy(**TIGHT, io={"cache": tmp_path}))
    is_inside, is_unwrapped = threading.Event(), threading.Event()

    def wait(*args: Any) -> None:
        is_inside.set()
        assert is_unwrapped.wait(10)

    hook = net.blocks[2].register_forward_hook(wait)

    def sweep() -> None:
        with contextlib.suppress(PenstockError):  # perhaps it was closed before its end
            penstock.sweep(net).map(net, batches(2))

    thread = threading.Thread(target=sweep)
    thread.start()
    assert is_inside.wait(10)
    penstock.unwrap(net)
    is_unwrapped.set()
    thread.join()
    hook.remove()
    assert same(serially(net, batches(2)), expected)


def test_a_folder_taken_for_one_that_was_left_is_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another process comes between its making and its lock."""
    times = 0

    def others_come_first(lock: Any, how: int) -> None:
        nonlocal times
        times += 1
        if times == 1:
            shutil.rmtree(Path(lock.name).parent)

    monkeypatch.setattr(fcntl, "flock", others_come_first)
    folder = SpillFolder(tmp_path, "wrapped-")
    assert folder.path.exists()
    assert times == 2
    folder.cleanup()
    assert list(tmp_path.iterdir()) == []

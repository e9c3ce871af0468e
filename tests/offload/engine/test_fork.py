"""A child that was forked has none of its parent's threads, and none of its files."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import penstock
from nets import PAGE, Net, assert_usable, batches, make, serially, streamed
from penstock.io.errors import PenstockError
from penstock.io.fork_guard import ForkGuard
from penstock.io.memory.shared import SharedArena
from penstock.offload.model import engine_of
from penstock.offload.weights.spill_folder import SpillFolder

pytestmark = [
    pytest.mark.usefixtures("no_leaks"),
    # Python 3.12 warns of what these tests are about.
    pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning"),
]


def in_fork(fn: Callable[[], Any]) -> str:
    """What came of `fn()` in a forked child: the sentence of what it raised, or ""."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            fn()
        except PenstockError as error:
            os.write(writer, str(error).encode())
        finally:
            os._exit(0)
    os.close(writer)
    with open(reader, "rb") as pipe:
        found = pipe.read().decode()
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    return found


USES: dict[str, Callable[[Any], Any]] = {
    "a call": lambda net: net(batches(1)[0]),
    "a call of a resident module": lambda net: net.head(batches(1)[0]),
    "a look at a weight": lambda net: net.blocks[0].linear.weight.sum(),
    "a look at a resident weight": lambda net: net.head.weight.sum(),
    "a copy of all": lambda net: [w.clone() for w in net.state_dict().values()],
    "a sweep": lambda net: penstock.sweep(net),
    "statistics": lambda net: penstock.statistics(net),
    "unwrap": lambda net: penstock.unwrap(net),
}


@pytest.mark.parametrize("use", USES.values(), ids=USES)
@pytest.mark.parametrize("placement", [{"head": "device"}, {"head": "host"}])
def test_a_child_is_told_to_load_the_model_itself(
    use: Callable[[Any], Any], placement: dict[str, str]
) -> None:
    net = make(Net)
    expected = serially(net, batches(2))
    memory = {"host_memory": 3 * PAGE} if placement["head"] == "host" else {}
    with streamed(net, slots=3, placement=placement, **memory):
        with torch.inference_mode():
            net(batches(1)[0])
        assert f"belongs to process {os.getpid()}" in in_fork(lambda: use(net))
        assert_usable(net, net, expected)


def test_a_micro_batch_may_fork() -> None:
    net = make(Net)
    expected = serially(net, batches(2))
    found = []

    def fn(x: torch.Tensor) -> Any:
        found.append(in_fork(lambda: net(x)))
        return net(x)

    with streamed(net):
        with penstock.sweep(net) as sweep:
            sweep.map(fn, batches(2))
        assert all("belongs to process" in sentence for sentence in found)
        assert_usable(net, net, expected)


def test_what_a_child_drops_closes_and_leaves_is_still_its_parents(
    tmp_path: Path,
) -> None:
    net = make(Net)
    expected = serially(net, batches(2))
    with streamed(net, io={"cache": str(tmp_path)}):
        folder = net.__dict__["_penstock_spill"].folder

        def end() -> None:
            engine_of_parent.close()
            net.__exit__(None, None, None)
            folder.cleanup()
            gc.collect()

        engine_of_parent = engine_of(net)
        assert in_fork(end) == ""
        assert (folder.path / "model.safetensors").exists()
        assert_usable(net, net, expected)


def test_shared_memory_is_left_to_the_parent(tmp_path: Path) -> None:
    with SharedArena("key", PAGE, lambda arena: None, folder=tmp_path) as arena:
        assert in_fork(arena.close) == ""
        assert arena.path.exists()
    assert not arena.path.exists()


def test_a_folder_that_is_dropped_is_removed(tmp_path: Path) -> None:
    folder = SpillFolder(tmp_path, "wrapped-")
    path = folder.path
    assert path.exists()
    del folder
    gc.collect()
    assert not path.exists()


def test_who_is_told_of_a_fork_is_not_kept_alive_for_it() -> None:
    class Told:
        def tell(self) -> None:
            raise AssertionError("nobody is there to be told")

    told = Told()
    fork_guard = ForkGuard(in_child=told.tell)
    del told
    gc.collect()
    fork_guard.leave()
    assert fork_guard.is_forked

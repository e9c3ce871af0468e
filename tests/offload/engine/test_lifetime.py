"""A model that is dropped gives back all that it had, wherever that happens."""

from __future__ import annotations

import gc
import subprocess
import sys
import threading
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import penstock
from nets import PAGE, WIDTH, Net, batches, make
from penstock import Policy
from penstock.io.fork_guard import ForkGuard
from penstock.io.memory.shared import FOLDER
from penstock.offload.engine import life

# `no_leaks` is what these tests are about: its own collection comes after ours.
pytestmark = pytest.mark.usefixtures("no_leaks")

POLICIES: dict[str, dict[str, Any]] = {
    "disk": {},
    "disk by aiofiles": {"io": {"reader": "aiofiles"}},
    "disk by a link": {"links": {"disk": {"bandwidth": "10GB"}}},
    "host": {"host_memory": 2 * 3 * PAGE},
    "host by a link": {
        "host_memory": 2 * 3 * PAGE,
        "links": {"host": {"bandwidth": "10GB"}},
    },
    "host, shared": {"host_memory": 2 * 3 * PAGE, "host_shared": True},
    "peer": {"peer": {"cpu": 2 * 3 * PAGE}},
}


def wrapped(cache: Path, **policy: Any) -> Any:
    io = {"cache": str(cache)} | policy.pop("io", {})
    asked = Policy(device_memory=6 * PAGE, resident_below=1, io=io, **policy)
    return penstock.wrap(make(Net), asked)


def call(net: Any) -> None:
    with torch.inference_mode():
        net(batches(1)[0])


def sweep(net: Any) -> None:
    with penstock.sweep(net) as opened:
        opened.map(net, batches(3))


def break_off(net: Any) -> Any:
    """A sweep half way: one micro-batch has ended, one is suspended."""
    run = penstock.sweep(net).run(lambda n: [net(x) for x in batches(n)], [1, 2])
    next(run)
    return run


def break_off_in_a_thread(net: Any) -> Any:
    found: list[Any] = []
    thread = threading.Thread(target=lambda: found.append(break_off(net)))
    thread.start()
    thread.join()
    return found


def left(cache: Path) -> list[str]:
    """Threads and files of ours."""
    threads = [t.name for t in threading.enumerate() if t.name.startswith("penstock-")]
    return threads + [path.name for path in cache.glob("wrapped-*")]


@pytest.mark.parametrize("policy", POLICIES.values(), ids=POLICIES)
def test_a_dropped_model_leaves_nothing(policy: dict[str, Any], tmp_path: Path) -> None:
    before = set(FOLDER.glob("penstock-*"))
    for use in (call, sweep):
        net = wrapped(tmp_path, **policy)
        use(net)
        model = weakref.ref(net)
        del net
        gc.collect()
        assert model() is None
        assert left(tmp_path) == []
        assert set(FOLDER.glob("penstock-*")) <= before


@pytest.mark.parametrize("use", [break_off, break_off_in_a_thread])
def test_a_model_that_is_dropped_with_its_sweep_leaves_nothing(
    use: Callable[[Any], Any], tmp_path: Path
) -> None:
    net = wrapped(tmp_path)
    run = use(net)
    del net, run
    gc.collect()
    assert left(tmp_path) == []


@pytest.mark.parametrize(
    "kv", [{"tier": "disk"}, {"tier": "host"}, {"tier": "host", "dtype": "int8"}]
)
def test_a_dropped_model_that_generated_leaves_nothing(
    kv: dict[str, str], tmp_path: Path
) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=64,
        hidden_size=WIDTH,
        intermediate_size=WIDTH,
        num_hidden_layers=2,
        num_attention_heads=2,
        pad_token_id=0,
    )
    asked = Policy(
        device_memory="1MiB",
        kv=kv,
        links={"host": {"bandwidth": "10GB"}},
        io={"cache": str(tmp_path)},
    )
    made: Any = LlamaForCausalLM(config)
    model = penstock.wrap(made.eval(), asked)
    model.generate(torch.ones(1, 4, dtype=torch.long), max_new_tokens=2)
    assert any("kv-" in thread for thread in left(tmp_path))
    del made, model
    gc.collect()
    assert left(tmp_path) == []


def test_a_model_that_was_unwrapped_is_not_closed_again(tmp_path: Path) -> None:
    net = wrapped(tmp_path)
    alive = net.__dict__[penstock.offload.model._LIFE]._finaliser
    penstock.unwrap(net)
    assert not alive.alive
    call(net)  # it has its parameters again


def test_a_collection_on_one_of_our_threads_does_not_wait_for_its_end(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(life, "_MAX_SECONDS", threading.TIMEOUT_MAX)
    has_closed = threading.Event()

    def close() -> None:
        reader.join()
        has_closed.set()

    reader = threading.Thread(
        target=life._end, args=((close,), ForkGuard()), name="penstock-read-0"
    )
    reader.start()
    has_closed.wait()


def test_a_collection_while_threading_is_locked_is_waited_for_no_longer_than_allowed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(life, "_MAX_SECONDS", 0.001)
    has_closed = threading.Event()
    with threading._active_limbo_lock:  # type: ignore[attr-defined]
        life._end((has_closed.set,), ForkGuard())
        assert not has_closed.is_set()
    has_closed.wait()


def test_what_one_closer_raises_is_no_concern_of_the_next() -> None:
    has_closed = threading.Event()

    def fail() -> None:
        raise OSError("gone")

    life._end((fail, has_closed.set), ForkGuard())
    assert has_closed.is_set()


AT_EXIT = """
import sys, threading
sys.path.insert(0, sys.argv[2])
import torch
from nets import PAGE, Net, batches, make, penstock
from penstock import Policy

def wrapped(**policy):
    io = {"cache": sys.argv[1], "reader": policy.pop("reader", "threads")}
    asked = Policy(device_memory=6 * PAGE, resident_below=1, io=io, **policy)
    return penstock.wrap(make(Net), asked)

def keep():
    net = wrapped(reader="aiofiles")
    with torch.inference_mode():
        net(batches(1)[0])
    has_run.set()
    threading.Event().wait()

def run(number):
    try:
        return [shared(x) for x in batches(number)]
    finally:
        print("unwound", number, flush=True)

has_run = threading.Event()
threading.Thread(target=keep, daemon=True).start()
shared = wrapped(host_memory=6 * PAGE, host_shared=True)
outcomes = penstock.sweep(shared).run(run, [1, 2])
next(outcomes)
has_run.wait()
"""


@pytest.mark.slow
def test_an_interpreter_may_end_with_models_open_and_a_sweep_half_way(
    tmp_path: Path,
) -> None:
    before = set(FOLDER.glob("penstock-*"))
    done = subprocess.run(
        [sys.executable, "-c", AT_EXIT, tmp_path, Path(__file__).parents[2]],
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == "unwound 1\nunwound 2\n"
    assert list(tmp_path.glob("wrapped-*")) == []
    assert set(FOLDER.glob("penstock-*")) <= before

"""One thread at a time runs a streamed model; others wait, but never for ever."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch

import penstock
from nets import (
    Net,
    assert_usable,
    batches,
    log,
    make,
    open_sites,
    same,
    serially,
    streamed,
    who,
)
from penstock.io.errors import ClosedError, PenstockError
from penstock.io.handle import Handle
from penstock.offload.model import engine_of
from penstock.scheduler.sweep import entry as entry_module
from penstock.scheduler.sweep import turn as turn_module

pytestmark = pytest.mark.usefixtures("no_leaks")


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(turn_module, "_POLL_SECONDS", 0.002)


class Caller(threading.Thread):
    """Calls `fn` and keeps what came of it."""

    def __init__(self, fn: Callable[[], Any]) -> None:
        super().__init__()
        self.fn = fn
        self.value: Any = None
        self.error: Exception | None = None
        self.has_begun = threading.Event()
        self.has_ended = threading.Event()

    def run(self) -> None:
        self.has_begun.set()
        try:
            with torch.inference_mode():
                self.value = self.fn()
        except Exception as error:
            self.error = error
        self.has_ended.set()


def test_a_call_from_another_thread_waits_for_the_sweep_and_then_runs() -> None:
    net = make(Net)
    items = batches(3)
    expected = serially(net, items)
    caller = Caller(lambda: net(items[0]))

    def fn(item: tuple[int, torch.Tensor]) -> torch.Tensor:
        who.set(item[0])
        if item[0] == 0:
            caller.start()
            caller.has_begun.wait()
        return net(item[1])  # type: ignore[no-any-return]

    with streamed(net), penstock.sweep(net) as sweep:
        assert same(sweep.map(fn, enumerate(items)), expected)
        caller.join()
        assert open_sites(net) == []
    assert caller.error is None
    assert same(caller.value, expected[0])
    assert [number for _, number in log][-5:] == [-1] * 5  # all of it, after the sweep


def waits_by_join(caller: Caller) -> None:
    caller.join()


def waits_by_event(caller: Caller) -> None:
    caller.has_ended.wait()


def waits_by_queue(caller: Caller) -> None:
    results: queue.Queue[Any] = queue.Queue()
    inner, caller.fn = caller.fn, lambda: None

    def put() -> None:
        try:
            results.put(inner())
        except PenstockError as error:
            caller.error = error
            results.put(error)

    caller.fn = put
    caller.start()
    results.get()


@pytest.mark.parametrize("wait", [waits_by_join, waits_by_event, waits_by_queue])
def test_a_micro_batch_that_waits_for_such_a_call_is_no_deadlock(
    wait: Callable[[Caller], None], impatient: None
) -> None:
    net = make(Net)
    expected = serially(lambda x: net(net(x)), batches(3))
    caller = Caller(lambda: net(batches(1)[0]))

    def fn(item: tuple[int, torch.Tensor]) -> torch.Tensor:
        x = net(item[1])
        if item[0] == 1:
            if wait is not waits_by_queue:
                caller.start()
            wait(caller)
        return net(x)  # type: ignore[no-any-return]

    with streamed(net), penstock.sweep(net) as sweep:
        assert same(sweep.map(fn, enumerate(batches(3))), expected)
        caller.join()
        assert_usable(net, net, serially(net, batches(2)))
    assert isinstance(caller.error, PenstockError)
    assert "which waits for the sweep" in str(caller.error)


def test_a_caller_that_joins_such_a_thread_between_outcomes_is_no_deadlock(
    impatient: None,
) -> None:
    net = make(Net)
    with streamed(net), penstock.sweep(net) as sweep:
        for _ in sweep.run(lambda n: [net(x) for x in batches(n)], [1, 2]):
            caller = Caller(lambda: net(batches(1)[0]))
            caller.start()
            caller.join()
            assert isinstance(caller.error, PenstockError)
        assert_usable(net, net, serially(net, batches(2)))


def test_waiting_for_weights_is_not_waiting_for_a_thread(
    impatient: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A micro-batch stands in a load for very long; the thread that waits for its turn
    just goes on waiting."""
    net = make(Net)
    expected = serially(net, batches(2))
    slow = Handle(1)

    def call() -> Any:
        try:
            return net(batches(1)[0])
        finally:
            slow.done()  # were it to fail, nobody should wait for ever

    caller = Caller(call)

    def fn(item: tuple[int, torch.Tensor]) -> torch.Tensor:
        if item[0] == 1:
            caller.start()
            caller.has_begun.wait()
            slow.wait()
        return net(item[1])  # type: ignore[no-any-return]

    with streamed(net):
        is_waited_for, num_polls = turn_module.is_waited_for, 0

        def counted(*args: Any) -> bool:
            nonlocal num_polls
            num_polls += 1
            if num_polls == 3 * turn_module._STUCK_POLLS:
                slow.done()
            return is_waited_for(*args)

        monkeypatch.setattr(entry_module, "is_waited_for", counted)
        with penstock.sweep(net) as sweep:
            assert same(sweep.map(fn, enumerate(batches(2))), expected)
        caller.join()
    assert caller.error is None
    assert same(caller.value, expected[0])


def test_plain_calls_of_many_threads_take_turns() -> None:
    net = make(Net)
    items = batches(12)
    expected = serially(net, items)

    def call(x: torch.Tensor) -> Any:
        with torch.inference_mode():
            return net(x)

    with streamed(net):
        with ThreadPoolExecutor(4) as pool:
            assert same(list(pool.map(call, items)), expected)
        assert_usable(net, net, expected)


def test_sweeps_of_two_threads_take_turns() -> None:
    net = make(Net)
    expected = serially(net, batches(4))

    def sweep() -> list[Any]:
        with penstock.sweep(net) as mine:
            return mine.map(net, batches(4))

    with streamed(net):
        callers = [Caller(sweep) for _ in range(3)]
        for caller in callers:
            caller.start()
        for caller in callers:
            caller.join()
        assert [caller.error for caller in callers] == [None] * 3
        assert all(same(caller.value, expected) for caller in callers)
        assert open_sites(net) == []


def test_a_hook_of_another_thread_closes_nothing_of_mine() -> None:
    """torch calls `after` even where `before` has raised: with no turn of its own."""
    net = make(Net)
    with streamed(net):
        entry = engine_of(net)._entry
        entry.before(0)
        other = Caller(lambda: entry.after(0))
        other.start()
        other.join()
        assert other.error is None
        assert entry.open_sites.is_open(0)
        entry.after(0)
        assert open_sites(net) == []


def test_a_sweep_closed_by_another_thread_ends_at_its_next_step() -> None:
    net = make(Net)
    expected = serially(net, batches(2))
    with streamed(net):
        with penstock.sweep(net) as sweep:
            run = sweep.run(lambda n: [net(x) for x in batches(n)], [1, 2, 3])
            next(run)
            closer = Caller(sweep.close)
            closer.start()
            closer.join()
            with pytest.raises(ClosedError, match="closed before it had ended"):
                next(run)
        assert_usable(net, net, expected)


class Halfway:
    """A sweep whose first outcome was taken in a thread of its own, which waits."""

    def __init__(self, net: Any, ends: list[int]) -> None:
        self.pool = ThreadPoolExecutor(1)
        self.thread = self.pool.submit(threading.get_ident).result()
        self.sweep = penstock.sweep(net)

        def fn(number: int) -> list[torch.Tensor]:
            try:
                return [net(x) for x in batches(number)]
            finally:
                ends.append(threading.get_ident())
                if number == 3:  # it is to end all the same
                    net(batches(1)[0])

        self.run: Any = self.sweep.run(fn, [1, 2, 3])
        assert self.next().index == 0
        assert ends == [self.thread]

    def next(self) -> Any:
        return self.pool.submit(next, self.run).result()


def test_outcomes_are_refused_to_another_thread_and_come_to_their_own() -> None:
    net, ends = make(Net), list[int]()
    expected = serially(lambda n: [net(x) for x in batches(n)], [1, 2, 3])
    with streamed(net):
        halfway = Halfway(net, ends)
        with pytest.raises(PenstockError, match="are taken in one thread"):
            next(halfway.run)
        assert same([halfway.next().value for _ in range(2)], expected[1:])
        halfway.pool.shutdown()
        assert_usable(net, net, serially(net, batches(2)))


@pytest.mark.parametrize("what", ["sweep", "run"])
def test_a_sweep_closed_by_another_thread_unwinds_in_its_own(what: str) -> None:
    net, ends = make(Net), list[int]()
    expected = serially(net, batches(2))
    with streamed(net):
        halfway = Halfway(net, ends)
        getattr(halfway, what).close()
        assert_usable(net, net, expected)  # while that thread idles
        assert ends == [halfway.thread]
        halfway.pool.submit(assert_usable, net, net, expected).result()
        assert ends == [halfway.thread] * 3
        halfway.pool.shutdown()
        assert_usable(net, net, expected)


def test_a_thread_that_ends_takes_its_sweep_with_it() -> None:
    net, ends = make(Net), list[int]()
    expected = serially(net, batches(2))
    with streamed(net):
        halfway = Halfway(net, ends)
        halfway.pool.shutdown()
        assert ends == [halfway.thread] * 3
        assert_usable(net, net, expected)
        with pytest.raises(PenstockError, match="are taken in one thread"):
            next(halfway.run)


def test_a_sweep_that_was_left_unwinds_when_its_thread_ends() -> None:
    net, ends = make(Net), list[int]()
    expected = serially(net, batches(2))
    with streamed(net):
        halfway = Halfway(net, ends)
        halfway.sweep.close()
        halfway.pool.shutdown()
        assert ends == [halfway.thread] * 3
        assert_usable(net, net, expected)


def test_a_sweep_is_not_ended_under_a_plain_call_of_its_thread() -> None:
    net, ends = make(Net), list[int]()
    expected = serially(net, batches(2))
    with streamed(net):
        halfway = Halfway(net, ends)
        is_inside, may_go = threading.Event(), threading.Event()

        def wait(module: Any, args: Any) -> None:
            is_inside.set()
            may_go.wait()

        hook = net.blocks[2].linear.register_forward_pre_hook(wait)
        with torch.inference_mode():
            call = halfway.pool.submit(torch.inference_mode()(net), batches(1)[0])
        is_inside.wait()
        halfway.run.close()
        hook.remove()
        may_go.set()
        assert same(call.result(), expected[0])
        halfway.pool.shutdown()
        assert ends == [halfway.thread] * 3
        assert_usable(net, net, expected)

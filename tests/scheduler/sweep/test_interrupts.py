"""Ctrl-C may strike anywhere: all that ran is unwound, and the model works again."""

from __future__ import annotations

import contextlib
import itertools
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import greenlet
import pytest
import torch

import penstock
from nets import (
    Block,
    Net,
    assert_usable,
    batches,
    make,
    open_sites,
    same,
    serially,
    streamed,
)
from penstock.io.errors import ClosedError
from penstock.offload.engine import tiers
from penstock.offload.model import engine_of
from penstock.scheduler.sweep import in_flight, loop
from shares import shared

pytestmark = pytest.mark.usefixtures("no_leaks")

SCHEDULER = str(Path(loop.__file__).parents[1])


@pytest.fixture
def flows() -> Iterator[list[Any]]:
    """The greenlets of all micro-batches; every one must be dead in the end."""
    seen: list[Any] = []
    yield seen
    assert [flow for flow in seen if not flow.dead] == []


def interrupted(
    net: Any, number: int, flows: list[Any], unwound: list[int]
) -> Callable[[int], None]:
    """Micro-batches that all wait when `number` of them is interrupted."""

    def fn(mine: int) -> None:
        flows.append(greenlet.getcurrent())
        try:
            net(batches(1)[0])
            if mine == number:
                raise KeyboardInterrupt
            for _ in range(5):
                net(batches(1)[0])
        finally:
            unwound.append(mine)

    return fn


@pytest.mark.parametrize("number", [0, 2, 4])
def test_an_interrupt_in_a_micro_batch_ends_the_sweep(
    number: int, flows: list[Any]
) -> None:
    net = make(Net)
    expected = serially(net, batches(3))
    unwound: list[int] = []
    with streamed(net):
        with penstock.sweep(net) as sweep:
            fn = interrupted(net, number, flows, unwound)
            with pytest.raises(KeyboardInterrupt):
                sweep.map(fn, range(5))
            assert sorted(unwound) == [0, 1, 2, 3, 4]
            assert same(sweep.map(net, batches(3)), expected)
        assert_usable(net, net, expected)


def test_an_interrupt_in_the_batches_ends_the_sweep(flows: list[Any]) -> None:
    net = make(Net)
    expected = serially(net, batches(3))
    unwound: list[int] = []

    def until_interrupted() -> Iterator[int]:
        yield from range(3)
        raise KeyboardInterrupt

    with streamed(net):
        with penstock.sweep(net, width=3) as sweep:
            fn = interrupted(net, -1, flows, unwound)
            with pytest.raises(KeyboardInterrupt):
                sweep.map(fn, until_interrupted())
            assert sorted(unwound) == [0, 1, 2]
        assert_usable(net, net, expected)


def test_an_interrupt_inside_of_a_block_leaves_it_closed(flows: list[Any]) -> None:
    class Interrupting(Block):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            if x.shape[0] == 3:
                raise KeyboardInterrupt
            return super().forward(x)

    net = make(Net)
    net.blocks[2] = make(Interrupting)
    expected = serially(net, batches(3))
    with streamed(net):
        with penstock.sweep(net) as sweep, pytest.raises(KeyboardInterrupt):
            sweep.map(net, [*batches(2), torch.zeros(3, 32)])
        assert_usable(net, net, expected)


def test_an_interrupted_plain_call_is_cleaned_up_by_the_next_one() -> None:
    net = make(Net)
    expected = serially(net, batches(3))

    def interrupt(module: Any, args: Any) -> None:
        raise KeyboardInterrupt

    def look(x: torch.Tensor) -> Any:
        seen.append(open_sites(net))
        return net(x)

    seen: list[list[str]] = []
    with streamed(net):
        for is_sweep in (False, True):
            hook = net.blocks[2].linear.register_forward_pre_hook(interrupt)
            with pytest.raises(KeyboardInterrupt):
                net(batches(1)[0])
            hook.remove()
            assert open_sites(net) == ["blocks.2", "units in use"]
            with penstock.sweep(net) as sweep, torch.inference_mode():
                found = sweep.map(look, batches(3)) if is_sweep else net(batches(1)[0])
            assert same(found, expected if is_sweep else expected[0])
            assert open_sites(net) == []
    assert seen[0] == []


def test_an_interrupt_while_looking_ahead_leaves_nothing_open(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    net = make(Net)
    expected = serially(net, batches(2))

    def interrupt(*args: Any) -> None:
        raise KeyboardInterrupt

    with streamed(net):
        with monkeypatch.context() as patch:
            patch.setattr(engine_of(net)._working_set, "prefetch", interrupt)
            with pytest.raises(KeyboardInterrupt):
                net(batches(1)[0])
            assert open_sites(net) == []
        assert_usable(net, net, expected)


def test_another_interrupt_while_others_unwind_is_raised_once_all_have(
    flows: list[Any],
) -> None:
    net = make(Net)
    expected = serially(net, batches(3))
    unwound: list[int] = []

    def fn(number: int) -> None:
        flows.append(greenlet.getcurrent())
        try:
            for _ in range(1 + number):
                net(batches(1)[0])
            raise ValueError
        finally:
            unwound.append(number)
            if number == 2:
                raise KeyboardInterrupt

    with streamed(net):
        with penstock.sweep(net) as sweep:
            run = sweep.run(fn, range(5))
            next(run)
            with pytest.raises(KeyboardInterrupt):
                run.close()
            assert sorted(unwound) == [0, 1, 2, 3, 4]
        assert_usable(net, net, expected)


# Micro-batches that will not go.


@pytest.mark.parametrize("num_tries", [1, 3, 50])
def test_who_catches_the_exit_and_calls_again_is_told_again(
    num_tries: int, flows: list[Any]
) -> None:
    net = make(Net)
    expected = serially(net, batches(3))
    caught: list[BaseException] = []

    def stubborn(number: int) -> str:
        flows.append(greenlet.getcurrent())
        if number == 0:
            net(batches(1)[0])
            return "done"
        for _ in range(num_tries + 3):
            try:
                net(batches(1)[0])
            except BaseException as error:
                caught.append(error)
                if len(caught) == num_tries:
                    raise
        return "swallowed"

    with streamed(net):
        with penstock.sweep(net) as sweep:
            assert next(sweep.run(stubborn, range(2))).value == "done"
        assert_usable(net, net, expected)
    assert [type(error) for error in caught] == [greenlet.GreenletExit] * num_tries


def test_who_never_lets_go_is_left_behind(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    left: list[Any] = []
    monkeypatch.setattr(in_flight, "_LEFT_BEHIND", left)
    net = make(Net)
    expected = serially(net, batches(3))
    may_go = False

    def for_ever(number: int) -> str:
        while number:
            try:
                net(batches(1)[0])
            except BaseException:
                if may_go:
                    raise
        net(batches(1)[0])
        return "done"

    with streamed(net):
        with penstock.sweep(net) as sweep:
            assert next(sweep.run(for_ever, range(2))).value == "done"
        assert len(left) == 1
        assert "micro-batch 1 swallows its exit and is left behind" in caplog.text
        assert_usable(net, net, expected)
        may_go = True
        left.pop().exit()


def test_who_raises_the_exit_itself_is_ended_by_it(flows: list[Any]) -> None:
    net = make(Net)

    def fn(number: int) -> int:
        flows.append(greenlet.getcurrent())
        net(batches(1)[0])
        if number == 1:
            raise greenlet.GreenletExit
        return number

    with streamed(net), penstock.sweep(net) as sweep:
        found = sweep.map(fn, range(3), return_exceptions=True)
    assert [found[0], found[2]] == [0, 2]
    assert isinstance(found[1], ClosedError)


# Everywhere.


class InterruptAtLine:
    """Raises KeyboardInterrupt as the `count`-th line of the scheduler (of its files
    called `files`, if any are named) begins."""

    def __init__(self, count: int, *files: str) -> None:
        self.left = count
        self.at = ""
        self._paths = tuple(f"{SCHEDULER}/{file}" for file in files or [""])

    def __enter__(self) -> InterruptAtLine:
        self._before = sys.gettrace()  # coverage, perhaps
        sys.settrace(self._on_call)
        return self

    def __exit__(self, *error: object) -> None:
        sys.settrace(self._before)

    def _on_call(self, frame: FrameType, event: str, arg: Any) -> Any:
        is_ours = frame.f_code.co_filename.startswith(self._paths)
        return self._on_line if is_ours else None

    def _on_line(self, frame: FrameType, event: str, arg: Any) -> Any:
        if event == "line":
            self.left -= 1
            if self.left == 0:
                self.at = f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno}"
                raise KeyboardInterrupt(self.at)
        return self._on_line


def strike(net: Any, expected: list[Any], interrupt: InterruptAtLine) -> bool:
    """Interrupts a sweep. Whether it did; either way nothing may come of it."""
    seen = torch.get_rng_state(), torch.is_grad_enabled(), torch.get_default_dtype()

    def fn(x: torch.Tensor) -> Any:
        with torch.enable_grad(), torch.autocast("cpu", enabled=False):
            return net(x)

    with (
        contextlib.suppress(KeyboardInterrupt),
        interrupt,
        penstock.sweep(net, seed=0) as sweep,
    ):
        sweep.map(fn, batches(2))
    assert open_sites(net) == [], interrupt.at
    assert torch.equal(torch.get_rng_state(), seen[0]), interrupt.at
    assert torch.is_grad_enabled() == seen[1], interrupt.at
    assert torch.get_default_dtype() == seen[2], interrupt.at
    assert not torch.is_inference_mode_enabled(), interrupt.at
    with torch.inference_mode():
        assert same(net(batches(1)[0]), expected[0]), interrupt.at
    assert open_sites(net) == [], interrupt.at
    return interrupt.at != ""


@pytest.mark.slow
@pytest.mark.parametrize("first", shared([1, 21, 41, 61], lambda n, _: n % 2 == 0))
def test_whatever_line_an_interrupt_strikes_the_model_works_again(first: int) -> None:
    """Every 20-th of the lines that the scheduler runs, in four parts."""
    net = make(Net, 2)
    expected = serially(net, batches(2))
    # Room to spare: struck between claiming a slot and loading it, it is lost.
    with streamed(net, slots=3):
        lines = itertools.count(first, 80)
        assert sum(
            itertools.takewhile(
                bool, (strike(net, expected, InterruptAtLine(n)) for n in lines)
            )
        )


@pytest.mark.slow
@pytest.mark.usefixtures("few_objects")
@pytest.mark.parametrize(
    ("file", "every"),
    [
        ("activations/activation_offload.py", 13),
        ("activations/ownership.py", 401),
        ("activations/referrers.py", 111),
        pytest.param("activations/activation_offload.py", 2, marks=pytest.mark.whole),
        pytest.param("activations/ownership.py", 67, marks=pytest.mark.whole),
        pytest.param("activations/referrers.py", 37, marks=pytest.mark.whole),
    ],
)
def test_no_line_of_moving_out_and_back_loses_anything(
    file: str, every: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tiers, "MIN_BYTES", 1)
    net = make(Net, 2)
    expected = serially(net, batches(3))
    seen: list[bool] = []

    def fn(x: torch.Tensor) -> Any:
        y = x + 1
        try:
            return net(x)
        finally:
            seen.append(torch.equal(y, x + 1))

    with streamed(net, slots=3, activations="host"):
        lines = itertools.count(1, every)
        for number in lines:
            interrupt = InterruptAtLine(number, file)
            with (
                contextlib.suppress(KeyboardInterrupt),
                interrupt,
                penstock.sweep(net) as sweep,
            ):
                sweep.map(fn, batches(3))
            assert all(seen), interrupt.at
            assert open_sites(net) == [], interrupt.at
            if not interrupt.at:
                break
        assert number > 20
        assert len(seen) > number // every
        assert_usable(net, net, expected)


@pytest.mark.slow
def test_no_line_between_two_micro_batches_leaves_the_thread_in_the_wrong_state() -> (
    None
):
    block = make(Block)
    expected = serially(block, batches(2))
    files = "sweep/thread_state.py", "sweep/micro_batch.py"
    with streamed(block):
        lines = itertools.count(1)
        assert sum(
            itertools.takewhile(
                bool,
                (strike(block, expected, InterruptAtLine(n, *files)) for n in lines),
            )
        )

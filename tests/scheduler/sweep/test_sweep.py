"""A sweep runs every micro-batch through a site while it is there, and each of them
gets what it would get alone."""

from __future__ import annotations

import gc
import itertools
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import nn

import penstock
from nets import (
    WIDTH,
    Block,
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
from penstock import Policy
from penstock.io.errors import ClosedError, PenstockError, ReadError
from penstock.offload.model import engine_of

pytestmark = pytest.mark.usefixtures("no_leaks")


def named(model: Callable[[Any], Any]) -> Callable[[tuple[int, Any]], Any]:
    """`model` for batches that come with a number, which the blocks log."""

    def run(item: tuple[int, Any]) -> Any:
        who.set(item[0])
        return model(item[1])

    return run


# Order and results.


@pytest.mark.parametrize("num_blocks", [1, 2, 5])
@pytest.mark.parametrize("width", [None, 1, 2, 3])
@pytest.mark.parametrize("num_batches", [1, 5])
def test_results_equal_those_of_one_batch_after_the_other(
    num_blocks: int, width: int | None, num_batches: int
) -> None:
    net = make(Net, num_blocks)
    items = batches(num_batches)
    expected = serially(net, items)
    with streamed(net), penstock.sweep(net, width=width) as sweep:
        assert same(sweep.map(net, items), expected)
        assert open_sites(net) == []


def test_all_micro_batches_run_a_site_before_any_runs_the_next() -> None:
    net = make(Net)
    with streamed(net), penstock.sweep(net) as sweep:
        sweep.map(named(net), enumerate(batches(4)))
    assert [site for site, _ in log] == [s for s in "01234" for _ in range(4)]
    for _, served in itertools.groupby(log, key=lambda entry: entry[0]):
        assert sorted(number for _, number in served) == [0, 1, 2, 3]


def test_one_pass_reads_every_unit_once_for_all() -> None:
    net = make(Net)
    with streamed(net), penstock.sweep(net) as sweep:
        sweep.map(net, batches(6))
        statistics = penstock.statistics(net)
    assert statistics.passes == 1
    assert statistics.bytes_loaded == statistics.model_bytes
    assert statistics.num_unused_loads == 0


def test_the_end_of_a_list_is_known_and_nothing_is_fetched_for_more() -> None:
    net = make(Net)
    with streamed(net), penstock.sweep(net, width=4) as sweep:
        sweep.map(net, batches(4))
        statistics = penstock.statistics(net)
    assert statistics.bytes_loaded == statistics.model_bytes


def test_no_batches_no_results() -> None:
    net = make(Net)
    with streamed(net), penstock.sweep(net) as sweep:
        assert sweep.map(net, []) == []
        assert sweep.statistics().num_started == 0


def test_a_function_that_calls_no_model_is_run_all_the_same() -> None:
    net = make(Net)
    with streamed(net), penstock.sweep(net) as sweep:
        assert sweep.map(lambda n: n * 2, range(5)) == [0, 2, 4, 6, 8]


def test_modules_get_the_very_arguments_they_were_called_with() -> None:
    seen: list[bool] = []

    class Picky(Block):
        def forward(self, x: Any, extra: Any = None) -> Any:
            seen.append(extra is marker and isinstance(x, torch.Tensor))
            return super().forward(x)

    class Calling(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList(Picky() for _ in range(3))

        def forward(self, x: Any) -> Any:
            for block in self.blocks:
                x = block(x, extra=marker)
            return x

    marker = object()
    net = make(Calling)
    with streamed(net), penstock.sweep(net) as sweep:
        sweep.map(net, batches(3))
    assert seen == [True] * 9


# Places.


def test_who_ends_is_replaced_at_once() -> None:
    net = make(Net)
    items = batches(7)
    alive: set[int] = set()
    most = 0

    def steps(item: tuple[int, torch.Tensor]) -> torch.Tensor:
        nonlocal most
        number, x = item
        alive.add(number)
        most = max(most, len(alive))
        for _ in range(1 + number % 3):
            x = net(x)
        alive.remove(number)
        return x

    expected = serially(steps, enumerate(items))
    with streamed(net), penstock.sweep(net, width=2) as sweep:
        assert same(sweep.map(steps, enumerate(items)), expected)
        statistics = sweep.statistics()
    assert most == 2
    assert statistics.max_in_flight == 2
    assert statistics.num_started == statistics.num_finished == 7


def test_batches_are_taken_only_as_places_become_free() -> None:
    net = make(Net)
    taken: list[int] = []

    def lazily() -> Iterator[torch.Tensor]:
        for number, item in enumerate(batches(9)):
            taken.append(number)
            yield item

    with streamed(net), penstock.sweep(net, width=3) as sweep:
        run = sweep.run(net, lazily())
        assert taken == []
        done = []
        for outcome in run:
            done.append(outcome.index)
            assert len(taken) <= len(done) + 3 + 2  # who ended in the same round
    assert sorted(done) == list(range(9))


def test_outcomes_come_as_they_are_done_and_say_which_they_are() -> None:
    net = make(Net)

    def steps(count: int) -> int:
        x = batches(1)[0]
        for _ in range(count):
            x = net(x)
        return count

    with streamed(net), penstock.sweep(net) as sweep:
        outcomes = list(sweep.run(steps, [3, 1, 2]))
    assert [(o.index, o.value) for o in outcomes] == [(1, 1), (2, 2), (0, 3)]


def test_a_sweep_of_no_width_is_refused() -> None:
    net = make(Net)
    with streamed(net), pytest.raises(PenstockError, match="at least 1"):
        penstock.sweep(net, width=0)


class Caching(nn.Module):
    """Keeps a cache of 64 KiB for every block it passes, as one that generates does."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        cache = []
        for block in self.blocks:
            x = block(x)
            cache.append(torch.zeros(16 << 10))
        return x + sum(float(part[0]) for part in cache)


@pytest.mark.parametrize("limit", [1, 2, 5])
def test_only_as_many_start_as_the_activation_budget_holds_at_the_end(
    limit: int,
) -> None:
    net = make(Caching)
    each = 8 * (64 << 10) + (20 << 10)  # its caches, its stack
    expected = serially(net, batches(8))
    with (
        streamed(net, activation_memory=limit * each),
        penstock.sweep(net) as sweep,
    ):
        assert same(sweep.map(net, batches(8)), expected)
        assert sweep.statistics().max_in_flight == limit


def test_the_others_catch_up_with_the_one_that_showed_what_it_keeps() -> None:
    net = make(Caching)
    for index, block in enumerate(net.blocks):
        block.name = str(index)
    each = 8 * (64 << 10) + (20 << 10)
    with streamed(net, activation_memory=5 * each), penstock.sweep(net) as sweep:
        sweep.map(named(net), list(enumerate(batches(5))))
        loaded = penstock.statistics(net).bytes_loaded
        weights = penstock.statistics(net).model_bytes
    sites = [site for site, _ in log]
    assert sorted(sites[:10]) == ["0"] * 5 + ["1"] * 5
    assert sites[10:] == [site for site in "234567" for _ in range(5)]
    assert loaded <= weights * 10 / 8  # two units again at most, not all of them


def test_what_a_micro_batch_holds_is_about_what_it_holds() -> None:
    net = make(Net)
    x = torch.randn(4096, WIDTH)
    with streamed(net), penstock.sweep(net) as sweep:
        sweep.map(net, [x, x.clone()])
        held = sweep.statistics().held_bytes_per_micro_batch
        assert penstock.statistics(net).held_bytes_per_micro_batch == held
    nbytes = x.numel() * 4
    assert 2 * nbytes <= held <= 4 * nbytes  # the batch, and a hidden state or three


def test_a_finished_micro_batch_leaves_nothing_of_its_own_behind() -> None:
    net = make(Net)
    kept: list[weakref.ref[torch.Tensor]] = []

    def fn(x: torch.Tensor) -> float:
        hidden = net(x)
        kept.append(weakref.ref(hidden))
        return float(hidden.sum())

    gc.disable()
    try:
        with streamed(net), penstock.sweep(net, width=1) as sweep:
            for outcome in sweep.run(fn, iter(batches(3))):
                assert kept[outcome.index]() is None
    finally:
        gc.enable()


def test_a_sweep_that_has_ended_keeps_no_batches() -> None:
    """Nor needs the garbage collector for that."""
    net, items = make(Net), batches(4)
    kept = [weakref.ref(item) for item in items]
    gc.disable()
    try:
        with streamed(net):
            with penstock.sweep(net, width=2) as sweep:
                sweep.map(net, items)
            del items, sweep
            assert [batch() for batch in kept] == [None] * 4
    finally:
        gc.enable()


# Errors.


def failing(net: Any, number: int, error: BaseException) -> Callable[[Any], Any]:
    def fn(item: tuple[int, torch.Tensor]) -> torch.Tensor:
        x: torch.Tensor = net(item[1])
        if item[0] == number:
            raise error
        return net(x)  # type: ignore[no-any-return]

    return fn


def test_an_exception_ends_its_own_micro_batch_only() -> None:
    net = make(Net)
    good = serially(lambda x: net(net(x)), batches(4))
    with streamed(net), penstock.sweep(net) as sweep:
        fn = failing(net, 1, ValueError("this one"))
        found = sweep.map(fn, enumerate(batches(4)), return_exceptions=True)
    assert isinstance(found[1], ValueError)
    assert same([found[0], *found[2:]], [good[0], *good[2:]])


def test_map_raises_the_first_error_once_all_have_run() -> None:
    net = make(Net)
    ran: list[int] = []

    def fn(number: int) -> None:
        net(batches(1)[0])
        ran.append(number)
        if number in (1, 3):
            raise ValueError(f"number {number}")

    with streamed(net), penstock.sweep(net) as sweep:
        with pytest.raises(ValueError, match="number 1") as error:
            sweep.map(fn, range(5))
        assert_usable(net, net, serially(net, batches(2)))
    assert sorted(ran) == [0, 1, 2, 3, 4]
    assert error.value.__notes__ == [
        "in micro-batch 1; 3 of 5 succeeded: return_exceptions=True keeps them"
    ]


def test_an_exception_inside_a_block_leaves_it_closed() -> None:
    class Fragile(Block):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            if x.shape[0] == 3:
                raise RuntimeError("three rows")
            return super().forward(x)

    class Row(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList([Block(), Fragile(), Block()])

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for block in self.blocks:
                x = block(x)
            return x

    net = make(Row)
    expected = serially(net, batches(2))
    with streamed(net), penstock.sweep(net) as sweep:
        items = [*batches(2), torch.zeros(3, WIDTH)]
        found = sweep.map(net, items, return_exceptions=True)
        assert same(found[:2], expected)
        assert str(found[2]) == "three rows"
        assert_usable(net, net, expected)


def test_an_error_in_the_batches_ends_the_sweep() -> None:
    net = make(Net)
    expected = serially(net, batches(3))

    def broken() -> Iterator[torch.Tensor]:
        yield from batches(2)
        raise OSError("the input ends early")

    with streamed(net):
        with penstock.sweep(net) as sweep:
            with pytest.raises(OSError, match="ends early"):
                sweep.map(net, broken())
            assert same(sweep.map(net, batches(3)), expected)
        assert_usable(net, net, expected)


def test_a_load_that_fails_ends_the_sweep_and_the_next_one_loads_again() -> None:
    net = make(Net)
    expected = serially(net, batches(3))
    with streamed(net):
        units = engine_of(net)._working_set
        load, calls = units._load, itertools.count()

        def failing_once(unit: int, offset: int, after: Any) -> Any:
            if next(calls) == 2:
                raise ReadError("the disk is gone")
            return load(unit, offset, after)

        units._load = failing_once
        with penstock.sweep(net) as sweep:
            assert same(sweep.map(net, batches(3)), expected)  # it was only prefetched
        assert_usable(net, net, expected)

        def failing_twice(unit: int, offset: int, after: Any) -> Any:
            if unit == 2:
                raise ReadError("the disk is gone")
            return load(unit, offset, after)

        units._load = failing_twice
        with (
            penstock.sweep(net) as sweep,
            pytest.raises(ReadError, match="the disk is gone"),
        ):
            sweep.map(net, batches(3))
        units._load = load
        assert_usable(net, net, expected)


# Beginning and end.


def test_run_may_be_left_at_any_outcome() -> None:
    net = make(Net)
    expected = serially(net, batches(3))
    unwound: list[int] = []

    def fn(number: int) -> None:
        try:
            for _ in range(1 + number):
                net(batches(1)[0])
        finally:
            unwound.append(number)

    with streamed(net), penstock.sweep(net) as sweep:
        run = sweep.run(fn, range(5))
        assert next(run).index == 0
        run.close()
        assert sorted(unwound) == [0, 1, 2, 3, 4]
        for outcome in sweep.run(fn, range(3)):
            assert outcome.error is None
            break
        assert_usable(net, net, expected)


def test_nothing_outlives_the_with_block_of_its_sweep() -> None:
    net = make(Net)
    expected = serially(net, batches(3))
    unwound: list[int] = []

    def fn(number: int) -> None:
        try:
            for _ in range(1 + number):
                net(batches(1)[0])
        finally:
            unwound.append(number)

    with streamed(net):
        with penstock.sweep(net) as sweep:
            run = sweep.run(fn, range(4))
            next(run)
        assert sorted(unwound) == [0, 1, 2, 3]
        assert_usable(net, net, expected)
        with pytest.raises(ClosedError, match="closed before it had ended"):
            next(run)
        with pytest.raises(ClosedError, match="open another one"):
            sweep.map(fn, [1])


def test_a_sweep_closed_by_its_own_micro_batch_says_so() -> None:
    net = make(Net)
    expected = serially(net, batches(3))

    def fn(number: int) -> None:
        for _ in range(1 + number):
            net(batches(1)[0])
        if number == 0:
            sweep.close()

    with streamed(net):
        with (
            penstock.sweep(net) as sweep,
            pytest.raises(ClosedError, match="closed before it had ended"),
        ):
            sweep.map(fn, range(3))
        assert_usable(net, net, expected)


def test_unwrapping_the_model_ends_its_sweeps() -> None:
    net = make(Net)
    expected = serially(net, batches(2))
    penstock.wrap(net, Policy(device_memory=24 << 10, resident_below=1))
    run = penstock.sweep(net).run(lambda n: [net(x) for x in batches(n)], [1, 2, 3])
    next(run)
    penstock.unwrap(net)
    with pytest.raises(ClosedError):
        next(run)
    assert same(serially(net, batches(2)), expected)


def test_a_second_sweep_in_the_middle_of_one_is_refused() -> None:
    net = make(Net)
    expected = serially(net, batches(3))
    with streamed(net), penstock.sweep(net) as sweep:
        found = []
        for outcome in sweep.run(net, batches(3)):
            found.append(outcome.value)
            with (
                penstock.sweep(net) as other,
                pytest.raises(PenstockError, match="sweep over this model is under"),
            ):
                other.map(net, batches(1))
        assert same(found, expected)
        assert_usable(net, net, expected)


def test_a_sweep_inside_a_micro_batch_of_the_same_model_is_refused() -> None:
    net = make(Net)

    def fn(x: torch.Tensor) -> Any:
        net(x)
        with penstock.sweep(net) as other:
            return other.map(net, [x])

    with streamed(net), penstock.sweep(net) as sweep:
        found = sweep.map(fn, batches(2), return_exceptions=True)
    assert [type(error) for error in found] == [PenstockError] * 2


def test_a_micro_batch_may_sweep_over_another_model() -> None:
    net, other = make(Net, 3), make(Net, 2)

    def both(x: torch.Tensor) -> Any:
        first = net(x)
        with penstock.sweep(other) as inner:
            return inner.map(lambda y: other(y) + net(y).sum(), [first, x])

    def plainly(x: torch.Tensor) -> Any:
        return [other(y) + net(y).sum() for y in (net(x), x)]

    expected = serially(plainly, batches(3))
    with streamed(net), streamed(other), penstock.sweep(net) as sweep:
        assert same(sweep.map(both, batches(3)), expected)


def test_plain_calls_between_outcomes_work() -> None:
    net = make(Net)

    def steps(number: int) -> Any:
        return [net(x) for x in batches(number)]

    expected = serially(steps, [1, 2, 3])
    with streamed(net), penstock.sweep(net) as sweep:
        for outcome in sweep.run(steps, [1, 2, 3]):
            assert same(outcome.value, expected[outcome.index])
            assert same(steps(3), expected[2])
        assert_usable(net, net, serially(net, batches(3)))


def test_batches_may_come_from_the_model_itself() -> None:
    net = make(Net)

    def chained() -> Iterator[torch.Tensor]:
        for x in batches(4):
            yield net(x)

    expected = serially(lambda x: net(net(x)), batches(4))
    with streamed(net, slots=4), penstock.sweep(net, width=2) as sweep:
        assert same(sweep.map(net, chained()), expected)


# Models that do not run straight through.


def check(net: Any, fn: Callable[[Any], Any], items: list[Any], **policy: Any) -> None:
    """Sweeps of several widths give what one batch after the other does."""
    expected = serially(fn, items)
    with streamed(net, **policy):
        for width in (None, 1, 2):
            with penstock.sweep(net, width=width) as sweep:
                assert same(sweep.map(fn, items), expected)
            assert open_sites(net) == []
        assert penstock.statistics(net).faults == {}


def test_each_micro_batch_takes_as_many_steps_as_it_likes() -> None:
    net = make(Net)

    def denoise(steps: int) -> torch.Tensor:
        x = batches(1)[0]
        for _ in range(steps):
            x = x - 0.1 * net(x)
        return x

    check(net, denoise, [4, 1, 3, 0, 2, 7])


def test_blocks_are_skipped_by_some() -> None:
    class Conditional(Net):
        def forward(self, item: tuple[str, torch.Tensor]) -> torch.Tensor:  # type: ignore[override]
            skipped, x = item
            for block in self.blocks:
                if str(block.name) not in skipped:
                    x = block(x)
            return x

    net = make(Conditional)
    skips = ["", "1", "23", "01234", "0", "4"]
    check(net, net, list(zip(skips, batches(6), strict=True)))


def test_a_block_runs_several_times_in_a_row() -> None:
    class Repeating(Net):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for block in self.blocks:
                for _ in range(3):
                    x = block(x)
            return x

    net = make(Repeating, 3)
    check(net, net, batches(4))


def test_rounds_through_the_same_blocks() -> None:
    class Universal(Net):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for _ in range(3):
                x = super().forward(x)
            return x

    net = make(Universal, 3)
    check(net, net, batches(4))


class Sharing(nn.Module):
    """One module is used by the model itself and inside of every block."""

    class Using(Block):
        shared: Any

        def __init__(self, shared: nn.Module) -> None:
            super().__init__()
            self.shared = shared

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            inner: torch.Tensor = self.shared(super().forward(-x))
            return super().forward(x) + inner

    def __init__(self) -> None:
        super().__init__()
        self.shared = nn.Linear(WIDTH, WIDTH)
        self.blocks = nn.ModuleList(self.Using(self.shared) for _ in range(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.shared(x)
        for block in self.blocks:
            x = block(x)
        return x


def test_a_site_inside_of_another_site() -> None:
    net = make(Sharing)
    check(net, net, batches(4), slots=3)


def test_stragglers_inside_of_a_site_do_not_keep_its_units_while_others_run() -> None:
    net = make(Sharing)

    def late(number: int) -> Any:
        return [net(x) for x in batches(1 + number % 3)]

    check(net, late, list(range(6)), slots=3)


def test_a_block_that_is_used_at_several_places() -> None:
    class Tied(Net):
        def __init__(self) -> None:
            super().__init__(4)
            self.blocks[2] = self.blocks[0]
            self.head.weight = self.embed.weight

    net = make(Tied)
    check(net, net, batches(4), slots=3)


def test_a_whole_model_that_is_one_site() -> None:
    block = make(Block)
    expected = serially(block, batches(5))
    with streamed(block), penstock.sweep(block) as sweep:
        assert same(sweep.map(block, batches(5)), expected)


def test_sweeps_that_are_closed_are_forgotten() -> None:
    net = make(Net)
    with streamed(net):
        with penstock.sweep(net) as sweep:
            sweep.map(net, batches(2))
            held = sweep.statistics().held_bytes_per_micro_batch
        first = weakref.ref(sweep)
        for _ in range(3):
            with penstock.sweep(net) as sweep:
                sweep.map(net, batches(1))
        gc.collect()
        assert first() is None
        assert len(engine_of(net)._sweeps) == 1
        assert penstock.statistics(net).held_bytes_per_micro_batch >= held > 0


@pytest.mark.parametrize("is_inference", [False, True])
def test_weights_are_bound_as_the_resident_model_has_them(is_inference: bool) -> None:
    """`matmul` folds by `requires_grad`: the last bit would depend on the caller."""
    net = make(Net)
    seen: set[tuple[bool, bool]] = set()

    def look(module: nn.Module, args: Any) -> None:
        weights = [p.requires_grad for p in module.parameters(recurse=False)]
        seen.update((requires, torch.is_grad_enabled()) for requires in weights)

    for module in net.modules():
        if isinstance(module, nn.Linear):
            module.register_forward_pre_hook(look)
    with streamed(net), torch.inference_mode(is_inference), penstock.sweep(net) as s:
        s.map(net, batches(3))
    assert seen == {(True, False)}


@pytest.mark.parametrize(
    "values",
    [{"width": 0}, {"width": 1.5}, {"width": "4"}, {"seed": "x"}, {"seed": 2**70}],
)
def test_a_sweep_of_what_is_no_number_is_refused_before_it_begins(
    values: dict[str, Any],
) -> None:
    net = make(Net)
    expected = serially(net, batches(2))
    with streamed(net):
        with pytest.raises(PenstockError, match="whole number"):
            penstock.sweep(net, **values)
        assert same(penstock.sweep(net, seed=-1).map(net, batches(2)), expected)

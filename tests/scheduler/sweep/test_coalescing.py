"""Products of few rows are made once for all micro-batches, and each of them gets what
it would get alone."""

from __future__ import annotations

import contextlib
import itertools
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random
from typing import Any

import greenlet
import pytest
import torch
from test_interrupts import InterruptAtLine
from torch import nn
from torch.overrides import TorchFunctionMode

import penstock
import zoo
from nets import WIDTH, make, open_sites, same, serially, streamed
from penstock import Policy
from penstock.io.errors import PenstockError
from penstock.offload.engine import tiers
from penstock.offload.model import engine_of
from penstock.scheduler.sweep import coalescing
from shares import shared

pytestmark = pytest.mark.usefixtures("no_leaks")


def with_whole_numbers(module: nn.Module) -> nn.Module:
    """Sums of small whole numbers are exact in whatever order they are added."""
    generator = torch.Generator().manual_seed(0)
    for parameter in module.parameters():
        whole = torch.randint(-3, 4, parameter.shape, generator=generator)
        parameter.data.copy_(whole)
    return module


class Mlp(nn.Module):
    """Two products in a row, and a third that only some rows take."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(WIDTH, 2 * WIDTH)
        self.extra = nn.Linear(2 * WIDTH, 2 * WIDTH)
        self.down = nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.up(x) % 5
        if x.shape[0] % 2:
            x = self.extra(x) % 5
        found: torch.Tensor = self.down(x) % 5
        return found


class Net(nn.Module):
    def __init__(self, num_blocks: int = 3) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Mlp() for _ in range(num_blocks))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x)
        return x


def whole_net(num_blocks: int = 3) -> Any:
    return with_whole_numbers(make(Net, num_blocks)).eval()


def whole_batches(num: int, rows: Callable[[int], int] = lambda n: 2) -> list[Any]:
    generator = torch.Generator().manual_seed(1)
    return [
        torch.randint(-4, 5, (rows(n), WIDTH), generator=generator).float()
        for n in range(num)
    ]


@contextlib.contextmanager
def roomy(net: Any, **policy: Any) -> Iterator[Any]:
    """Streamed, with room for two of the larger blocks."""
    with streamed(net, device_memory=100 << 10, **policy) as found:
        yield found


def replaced(module: nn.Module) -> list[nn.Module]:
    """The modules whose forward is not their class's own."""
    return [part for part in module.modules() if "forward" in vars(part)]


def assert_left_as_before(net: Any) -> None:
    assert replaced(net) == []
    assert open_sites(net) == []


def swept(net: Any, fn: Any, items: list[Any], **options: Any) -> list[Any]:
    options.setdefault("width", len(items))  # none goes ahead
    with penstock.sweep(net, coalesce=True, **options) as sweep:
        found = sweep.map(fn, items)
    assert_left_as_before(net)
    return found


# Results.


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    shared(
        ["llama", "gpt2", "mixtral", "qwen3_moe", "gpt_oss", "t5", "gemma3_text"],
        lambda place, _: place in (0, 4, 5),
    ),
)
def test_ragged_groups_generate_the_tokens_of_the_resident_model(
    name: str, tmp_path: Path
) -> None:
    zoo.save_checkpoint(name, tmp_path)
    resident = zoo.load(name, tmp_path)
    groups = [
        zoo.inputs(name, rows=1 + n % 4, tokens=4 + n % 5, seed=n, ragged=True)
        for n in range(16)
    ]
    for group in groups:
        group.pop("decoder_input_ids", None)
    greedy = {"max_new_tokens": 4, "do_sample": False}
    expected = [resident.generate(**group, **greedy) for group in groups]
    policy = Policy(device_memory="8MiB", resident_below=1)
    with penstock.load(tmp_path, policy) as model:
        found = swept(model, lambda group: model.generate(**group, **greedy), groups)
        statistics = penstock.statistics(model)
        kinds = {type(f.module).__name__ for f in engine_of(model).row_wise}
    assert same(found, expected)
    assert statistics.rows_per_joint_call > 30
    assert statistics.num_failed_joint_calls == 0
    special = {
        "llama": "LlamaMLP",
        "gpt2": "GPT2MLP",
        "mixtral": "MixtralExperts",
        "gpt_oss": "GptOssExperts",
    }
    assert special.get(name, "Linear") in kinds


def test_what_a_module_keeps_between_two_products_is_each_ones_own() -> None:
    class Recurrent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.into = nn.Linear(WIDTH, WIDTH)
            self.out = nn.Linear(WIDTH, WIDTH)
            self.state: torch.Tensor | None = None

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.into(x)
            self.state = x if self.state is None else self.state + x
            x = self.out(x)
            return x + self.state

    class Steps(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList(Recurrent() for _ in range(2))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for block in self.blocks:
                x = block(x)
            return x

    def run(x: torch.Tensor) -> torch.Tensor:
        return net(net(x))  # type: ignore[no-any-return]

    net = make(Steps)
    items = [torch.randn(2, WIDTH) for _ in range(5)]
    expected = []
    for item in items:
        for block in net.blocks:
            block.state = None
        with torch.inference_mode():
            expected.append(run(item))
    for block in net.blocks:
        block.state = None
    with streamed(net):
        found = swept(net, run, items)
        assert penstock.statistics(net).num_joint_calls > 0
    for mine, other in zip(found, expected, strict=True):
        assert torch.allclose(mine, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("width", [None, 1, 2, 5])
@pytest.mark.parametrize("limit", [3, 512])
def test_whole_numbers_come_out_exactly_as_one_after_the_other(
    width: int | None, limit: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(coalescing, "MAX_ROWS", limit)
    net = whole_net()
    items = whole_batches(11, rows=lambda n: 1 + n % 8)
    expected = serially(net, items)
    with roomy(net):
        for _ in range(2):
            assert same(swept(net, net, items, width=width), expected)
        assert (penstock.statistics(net).num_joint_calls > 0) == (width != 1)


def test_rows_may_have_any_shape() -> None:
    net = whole_net()
    flat = whole_batches(6, rows=lambda n: 6)
    shapes = [(6, WIDTH), (2, 3, WIDTH), (6, 1, WIDTH), (1, 2, 3, WIDTH)]
    items = [x.view(shapes[n % 4]) for n, x in enumerate(flat)]
    items += [torch.ones(WIDTH), torch.ones(WIDTH, 4).T, torch.ones(0, WIDTH)]
    expected = serially(net, items)
    with roomy(net):
        assert same(swept(net, net, items), expected)


def test_each_gets_memory_of_its_own() -> None:
    """In place, or kept for long: nothing of it is another's."""
    net = whole_net(1)
    with roomy(net):
        outputs: list[torch.Tensor] = []
        net.blocks[0].up.register_forward_hook(lambda m, a, out: outputs.append(out))
        swept(net, net, whole_batches(4))
    assert len({out.untyped_storage().data_ptr() for out in outputs}) == 4
    assert {out.untyped_storage().nbytes() for out in outputs} == {2 * 2 * WIDTH * 4}


class Wandering(nn.Module):
    """Calls its products in an order, and as often, as the rows themselves say."""

    def __init__(self, num: int = 4) -> None:
        super().__init__()
        self.parts = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(num))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        random = Random(int(x.sum()))
        for _ in range(random.randrange(8)):
            if random.random() < 0.02:
                raise ValueError("lost")
            x = random.choice(self.parts)(x) % 5
        return x


@pytest.mark.parametrize("seed", range(12))
def test_whatever_ways_they_take_each_comes_out_as_alone(
    seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    random = Random(seed)
    monkeypatch.setattr(coalescing, "MAX_ROWS", random.choice([4, 9, 512]))
    monkeypatch.setattr(coalescing, "WIDE_ROWS", random.choice([5, 256]))
    net = whole_net()
    for index in range(3):
        net.blocks[index] = Wandering()
    with_whole_numbers(net)
    items = whole_batches(20, rows=lambda n: 1 + (n + seed) % 6)

    def fn(x: torch.Tensor) -> Any:
        try:
            for _ in range(2):
                x = net(x)
        except ValueError:
            return "lost"
        return x

    expected = serially(fn, items)
    width = random.choice([None, 2, 7, 20])
    with roomy(net):
        assert same(swept(net, fn, items, width=width), expected)
        assert penstock.statistics(net).num_joint_calls > 0


# Counts.


def test_each_module_is_called_once_a_step_for_all() -> None:
    net = whole_net(3)
    items = whole_batches(8)

    def steps(x: torch.Tensor) -> Any:
        return net(net(x))

    expected = serially(steps, items)
    with roomy(net):
        assert same(swept(net, steps, items), expected)
        statistics = penstock.statistics(net)
    assert statistics.num_joint_calls == 2 * 3 * 2  # steps, blocks, products
    assert statistics.num_joint_rows == 8 * 2 * statistics.num_joint_calls
    assert statistics.rows_per_joint_call == 16
    assert statistics.num_failed_joint_calls == 0


class FeedForward(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(WIDTH, 2 * WIDTH)
        self.down = nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(self.up(x).relu()) % 5  # type: ignore[no-any-return]


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mlp = FeedForward()

    def forward(self, x: torch.Tensor, shift: int = 0) -> torch.Tensor:
        return x + self.mlp(x) + shift  # type: ignore[no-any-return]


def swept_as_is(net: Any, items: list[Any]) -> list[Any]:
    with penstock.sweep(net, coalesce=True, width=len(items)) as sweep:
        return sweep.map(net, items)


def test_an_mlp_is_called_as_a_whole() -> None:
    net = whole_net(2)
    net.blocks = nn.ModuleList(Residual() for _ in range(2))
    with_whole_numbers(net).eval()
    items = whole_batches(6)
    expected = serially(net, items)
    with roomy(net):
        kinds = [type(f.module) for f in engine_of(net).row_wise]
        assert kinds == [FeedForward, nn.Linear, nn.Linear] * 2
        assert same(swept(net, net, items), expected)
        before = penstock.statistics(net)
        assert before.num_joint_calls == 2
        assert before.num_failed_joint_calls == 0

        seen: list[int] = []  # a hook is shown each micro-batch's own rows
        up = net.blocks[1].mlp.up
        hook = up.register_forward_hook(lambda m, args, out: seen.append(len(out)))
        assert same(swept(net, net, items), expected)
        assert seen == [len(item) for item in items]
        now = penstock.statistics(net)
        assert now.num_joint_calls - before.num_joint_calls == 1 + 2
        hook.remove()

        before = penstock.statistics(net)
        up.forward = lambda x: nn.functional.linear(x, up.weight, up.bias)  # somebody's
        assert same(swept_as_is(net, items), expected)
        del up.forward
        net.train()  # randomness is each micro-batch's own
        assert same(swept(net, net, items), expected)
        net.eval()
        now = penstock.statistics(net)
        assert now.num_joint_calls - before.num_joint_calls == (1 + 1) + (2 + 2)


def test_who_takes_another_way_is_caught_up_with() -> None:
    """Micro-batches that call `extra` reach `down` later; all are together there."""
    net = whole_net(1)
    items = whole_batches(6, rows=lambda n: 1 + n % 2)
    expected = serially(net, items)
    called: list[int] = []
    with roomy(net):
        assert same(swept(net, net, items), expected)  # learns which comes after which
        for name in ("up", "extra", "down"):
            module = getattr(net.blocks[0], name)
            module.register_forward_pre_hook(lambda m, args: called.append(len(args)))
        before = penstock.statistics(net)
        assert same(swept(net, net, items), expected)
        after = penstock.statistics(net)
    assert len(called) == 6 + 3 + 6  # hooks see every micro-batch's own call
    assert after.num_joint_calls - before.num_joint_calls == 3
    assert after.num_joint_rows - before.num_joint_rows == 9 + 3 + 9


def test_many_rows_wait_for_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(coalescing, "WIDE_ROWS", 4)
    net = whole_net(1)
    items = whole_batches(6, rows=lambda n: 4 if n < 3 else 2)
    expected = serially(net, items)
    with roomy(net):
        assert same(swept(net, net, items), expected)
        statistics = penstock.statistics(net)
    assert statistics.num_joint_calls == 2
    assert statistics.num_joint_rows == 2 * 3 * 2


@pytest.mark.parametrize("what", ["MAX_ROWS", "MAX_OUTPUT_BYTES"])
def test_what_is_copied_together_is_bounded(
    what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    row = 2 * WIDTH * 4
    monkeypatch.setattr(coalescing, what, 4 if what == "MAX_ROWS" else 4 * row)
    net = whole_net(1)
    items = whole_batches(9)
    expected = serially(net, items)
    seen: list[int] = []
    whole = nn.Linear.forward

    def forward(self: nn.Linear, x: torch.Tensor) -> torch.Tensor:
        if self is net.blocks[0].up:
            seen.append(x.shape[0])
        return whole(self, x)

    monkeypatch.setattr(nn.Linear, "forward", forward)
    with roomy(net), penstock.sweep(net, width=9, coalesce=True) as sweep:
        for is_known in (what == "MAX_ROWS", True):  # how long a row of the output is
            seen.clear()
            assert same(sweep.map(net, items), expected)
            assert sum(seen) == 18
            assert max(seen) == (4 if is_known else 18)


# What keeps calls apart.


def test_calls_that_record_gradients_are_let_through() -> None:
    net = whole_net()
    items = whole_batches(6)
    expected = serially(net, items)

    def fn(item: tuple[int, torch.Tensor]) -> Any:
        number, x = item
        with torch.inference_mode(False), torch.set_grad_enabled(number % 2 == 0):
            return net(x.clone()).detach()

    with roomy(net):
        assert same(swept(net, fn, list(enumerate(items))), expected)
        rows = penstock.statistics(net).num_joint_rows
    assert rows == 3 * 2 * 3 * 2  # micro-batches, rows, blocks, products


def test_who_records_gradients_around_a_product_that_does_not_is_let_through() -> None:
    class Frozen(Mlp):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            with torch.no_grad():
                return super().forward(x)

    net = whole_net()
    net.blocks[1] = with_whole_numbers(Frozen())
    items = whole_batches(4)
    expected = serially(net, items)

    def fn(x: torch.Tensor) -> Any:
        with torch.inference_mode(False), torch.enable_grad():
            return net(x.clone()).detach()

    with roomy(net):
        assert same(swept(net, fn, items), expected)
        assert penstock.statistics(net).num_joint_calls == 0


def test_autocast_and_modes_of_one_are_not_anothers() -> None:
    class Doubling(TorchFunctionMode):
        def __torch_function__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            found = func(*args, **(kwargs or {}))
            return found * 2 if func is nn.functional.linear else found

    net = whole_net()

    def fn(item: tuple[int, torch.Tensor]) -> Any:
        number, x = item
        way = number % 4
        with contextlib.ExitStack() as stack:
            if way == 1:
                stack.enter_context(torch.autocast("cpu", torch.bfloat16))
            if way == 2:
                stack.enter_context(Doubling())
            if way == 3:
                stack.enter_context(torch.inference_mode(False))
                stack.enter_context(torch.no_grad())
            y = net(x.clone())
            return y, y.is_inference()

    items = list(enumerate(whole_batches(8)))
    expected = serially(fn, items)
    with roomy(net):
        assert same(swept(net, fn, items), expected)
        assert penstock.statistics(net).rows_per_joint_call == 4


def test_random_numbers_between_two_products_are_each_ones_own() -> None:
    class Noisy(Mlp):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.up(x) + torch.randint(3, (2 * WIDTH,))
            found: torch.Tensor = self.down(x % 5) + torch.randint(3, (WIDTH,))
            return found % 5

    net = whole_net()
    for index in range(3):
        net.blocks[index] = with_whole_numbers(Noisy())
    items = whole_batches(5)
    expected = serially(net, items, seed=3)
    before = torch.get_rng_state()
    with roomy(net):
        assert same(swept(net, net, items, seed=3), expected)
        assert penstock.statistics(net).num_joint_calls == 6
    assert torch.equal(torch.get_rng_state(), before)


def test_rows_under_vmap_are_not_joined() -> None:
    class Mapped(Mlp):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            found: torch.Tensor = torch.vmap(self.up)(x)
            return super().forward(x) + found[..., :WIDTH]

    net = whole_net(1)
    net.blocks[0] = with_whole_numbers(Mapped())
    items = whole_batches(4)
    expected = serially(net, items)
    with roomy(net):
        assert same(swept(net, net, items), expected)
        assert penstock.statistics(net).num_joint_calls == 2


# Errors.


def test_an_error_between_two_products_is_its_micro_batchs_own() -> None:
    class Failing(Mlp):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = self.up(x) % 5
            if x.shape[0] == 3:
                raise ValueError("three rows")
            found: torch.Tensor = self.down(y) % 5
            return found

    net = whole_net()
    net.blocks[1] = with_whole_numbers(Failing())
    items = whole_batches(7, rows=lambda n: 3 if n == 4 else 2)
    expected = serially(net, [x for x in items if len(x) == 2])
    with roomy(net):
        with penstock.sweep(net, coalesce=True) as sweep:
            found = sweep.map(net, items, return_exceptions=True)
        assert isinstance(found.pop(4), ValueError)
        assert same(found, expected)
        assert_left_as_before(net)


def test_only_the_culprit_of_a_joint_call_fails(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    whole = nn.Linear.forward

    def forward(self: nn.Linear, x: torch.Tensor) -> torch.Tensor:
        if (x == 9).any():
            raise ValueError("nine")
        return whole(self, x)

    monkeypatch.setattr(nn.Linear, "forward", forward)
    net = whole_net()
    items = whole_batches(6)
    expected = serially(net, items)
    items[2] = torch.full((2, WIDTH), 9.0)
    with roomy(net):
        with penstock.sweep(net, width=6, coalesce=True) as sweep:
            found = sweep.map(net, items, return_exceptions=True)
        assert isinstance(found.pop(2), ValueError)
        assert same(found, expected[:2] + expected[3:])
        statistics = penstock.statistics(net)
        assert statistics.num_failed_joint_calls == 1
        assert statistics.num_joint_calls == 3 * 2 - 1
        (said,) = (f for f in statistics.fallbacks if "joint call" in f)
        assert said == "a joint call of a Linear failed: ValueError('nine'); each alone"
        assert said in caplog.text
        assert_left_as_before(net)


def test_an_interrupt_in_a_joint_call_unwinds_all_who_are_parked(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    whole = nn.Linear.forward
    net = whole_net()
    items = whole_batches(5)
    expected = serially(net, items)
    flows: list[Any] = []
    unwound: list[int] = []
    down = net.blocks[1].down

    def forward(self: nn.Linear, x: torch.Tensor) -> torch.Tensor:
        if self is down and x.shape[0] == 10:
            raise KeyboardInterrupt
        return whole(self, x)

    def fn(item: tuple[int, torch.Tensor]) -> Any:
        flows.append(greenlet.getcurrent())
        try:
            return net(item[1])
        finally:
            unwound.append(item[0])

    with roomy(net):
        with monkeypatch.context() as patch:
            patch.setattr(nn.Linear, "forward", forward)
            with (
                penstock.sweep(net, coalesce=True) as sweep,
                pytest.raises(KeyboardInterrupt),
            ):
                sweep.map(fn, list(enumerate(items)))
        assert sorted(unwound) == [0, 1, 2, 3, 4]
        assert all(flow.dead for flow in flows)
        assert_left_as_before(net)
        assert same(swept(net, net, items), expected)
        with torch.inference_mode():
            assert same(net(items[0]), expected[0])


def test_who_calls_a_product_while_it_unwinds_gets_it() -> None:
    """Parked, ended, and its `finally` goes on calling the block's modules."""
    seen: list[bool] = []

    class Stubborn(Mlp):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            try:
                if len(x) == 3:
                    raise KeyboardInterrupt
                return super().forward(x)
            finally:
                seen.append(torch.equal(self.up(x), whole(self.up, x)))

    whole = nn.Linear.forward
    net = whole_net()
    net.blocks[1] = with_whole_numbers(Stubborn())
    items = whole_batches(4, rows=lambda n: 3 if n == 3 else 2)
    with roomy(net):
        with (
            penstock.sweep(net, coalesce=True) as sweep,
            pytest.raises(KeyboardInterrupt),
        ):
            sweep.map(net, items)
        assert seen == [True] * 4
        assert_left_as_before(net)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("file", "every"),
    [
        ("sweep/coalescing.py", 5),
        ("sweep/coalescing_queue.py", 7),
        ("sweep/row_call.py", 7),
        ("sweep/loop.py", 13),
        ("sweep/micro_batch.py", 13),
        ("sweep/thread_state.py", 41),
    ],
)
def test_whatever_line_an_interrupt_strikes_nothing_is_left(
    file: str, every: int
) -> None:
    net = whole_net(1)
    items = whole_batches(3, rows=lambda n: 1 + n % 2)
    expected = serially(net, items)
    seen = torch.get_rng_state(), torch.is_grad_enabled()
    with streamed(net, device_memory=160 << 10):
        for number in itertools.count(1, every):
            interrupt = InterruptAtLine(number, file)
            with (
                contextlib.suppress(KeyboardInterrupt),
                interrupt,
                penstock.sweep(net, coalesce=True, seed=0) as sweep,
            ):
                sweep.map(net, items)
            assert (replaced(net), open_sites(net)) == ([], []), interrupt.at
            assert torch.equal(torch.get_rng_state(), seen[0]), interrupt.at
            assert torch.is_grad_enabled() == seen[1], interrupt.at
            assert not torch.is_inference_mode_enabled(), interrupt.at
            with torch.inference_mode():
                assert same(net(items[0]), expected[0]), interrupt.at
            if not interrupt.at:
                break
        assert number > 4 * every
        assert same(swept(net, net, items), expected)


# Who asks for it.


@pytest.mark.parametrize(
    ("policy", "asked", "expected"),
    [
        ("auto", None, False),
        ("auto", True, True),
        ("auto", False, False),
        ("on", None, True),
        ("on", False, False),
        ("off", None, False),
        ("off", True, False),
    ],
)
def test_policy_and_caller_have_to_agree(
    policy: str, asked: bool | None, expected: bool
) -> None:
    net = whole_net(1)
    with roomy(net, coalesce=policy):
        with penstock.sweep(net, width=3, coalesce=asked) as sweep:
            sweep.map(net, whole_batches(3))
            assert (sweep.statistics().num_joint_calls > 0) == expected
        assert (penstock.statistics(net).num_joint_calls > 0) == expected


@pytest.mark.slow
def test_compiled_blocks_cannot_be_coalesced() -> None:
    pytest.importorskip("torch._dynamo")
    net = whole_net(1)
    with roomy(net, compile=True):
        with pytest.raises(PenstockError, match="compile: false or coalesce=False"):
            penstock.sweep(net, coalesce=True)
        penstock.sweep(net, coalesce=False).close()


def test_one_micro_batch_is_never_parked() -> None:
    net = whole_net()
    items = whole_batches(4)
    expected = serially(net, items)
    with roomy(net):
        assert same(swept(net, net, items, width=1), expected)
        assert same(swept(net, net, items[:1]), expected[:1])
        assert penstock.statistics(net).num_joint_calls == 0


def test_plain_calls_are_left_alone() -> None:
    """Between two runs of an open sweep; and while one runs, outside of sites and from
    another thread, of a module that is there for good once it was touched."""
    net = whole_net()
    items = whole_batches(4)
    expected = serially(net, items)
    found: list[Any] = []

    def call() -> None:
        with torch.inference_mode():
            found.append(net.blocks[0].up(items[0]))

    def fn(x: torch.Tensor) -> Any:
        call()
        thread = threading.Thread(target=call)
        thread.start()
        thread.join()
        return net(x)

    with (
        streamed(net, device_memory=200 << 10),
        penstock.sweep(net, width=4, coalesce=True) as sweep,
    ):
        assert replaced(net) == []
        assert same(sweep.map(fn, items), expected)
        assert replaced(net) == []
        with torch.inference_mode():
            assert same(net(items[0]), expected[0])
        assert same(sweep.map(net, items), expected)
        assert penstock.statistics(net).num_joint_calls == 2 * 3 * 2
    assert len(found) == 8
    assert same(found, found[:1] * 8)


def test_a_forward_that_somebody_else_put_in_stays() -> None:
    net = whole_net(1)
    items = whole_batches(3)
    down = net.blocks[0].down

    def forward(x: torch.Tensor) -> torch.Tensor:
        return nn.Linear.forward(down, x) + 1

    down.forward = forward
    expected = serially(net, items)
    with roomy(net):
        with penstock.sweep(net, width=3, coalesce=True) as sweep:
            assert same(sweep.map(net, items), expected)
        assert replaced(net) == [down]
        assert down.forward is forward
        assert penstock.statistics(net).num_joint_calls == 1


def test_a_second_run_that_is_refused_leaves_the_first_alone() -> None:
    net = whole_net()
    items = whole_batches(4)
    expected = serially(net, items)

    def try_another(module: nn.Module, args: Any) -> None:
        with pytest.raises(PenstockError, match="under way"):
            sweep.map(net, items)

    with roomy(net):
        with penstock.sweep(net, width=4, coalesce=True) as sweep:
            # By then, those who came before are parked.
            net.blocks[1].down.register_forward_pre_hook(try_another)
            assert same(sweep.map(net, items), expected)
            net.blocks[1].down._forward_pre_hooks.clear()
        assert penstock.statistics(net).num_joint_calls == 3 * 2
        assert_usable_whole(net, items, expected)


def assert_usable_whole(net: Any, items: list[Any], expected: list[Any]) -> None:
    with torch.inference_mode():
        assert same(net(items[0]), expected[0])
    assert_left_as_before(net)


# Beside the rest.


def test_sites_inside_of_sites_keep_their_weights_while_others_are_parked() -> None:
    """A block that calls another site in between: who comes back parks again."""

    class Calling(Mlp):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = [inner]  # a site, but none of its own modules

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.inner[0](self.up(x)[..., :WIDTH] % 5)
            found: torch.Tensor = self.down(torch.cat([x, x], -1)) % 5
            return found

    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            inner = Mlp()
            self.inner = nn.ModuleList([inner])
            self.blocks = nn.ModuleList(Calling(inner) for _ in range(2))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for block in self.blocks:
                x = block(x)
            return x

    net: Any = with_whole_numbers(make(Outer))
    items = whole_batches(5)
    expected = serially(net, items)
    with streamed(net, device_memory=160 << 10):
        assert same(swept(net, net, items), expected)
        statistics = penstock.statistics(net)
    assert statistics.num_joint_calls == 2 * 4
    assert statistics.rows_per_joint_call == 10


@pytest.mark.slow
@pytest.mark.usefixtures("few_objects")
def test_what_is_moved_out_comes_back_to_who_was_parked(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(tiers, "MIN_BYTES", 1)
    net = whole_net()
    items = whole_batches(6, rows=lambda n: 1 + n % 3)

    def fn(x: torch.Tensor) -> Any:
        kept = x + 1
        return net(x), net(kept), kept

    expected = serially(fn, items)
    with roomy(net, activations="host"):
        assert same(swept(net, fn, items), expected)
        statistics = penstock.statistics(net)
    assert statistics.num_joint_calls > 0
    assert statistics.activation_bytes_out > 0


def test_an_activation_budget_holds_while_others_are_parked() -> None:
    net = whole_net(4)
    items = whole_batches(8)
    expected = serially(net, items)
    with roomy(net, activation_memory=3 * (20 << 10)):
        with penstock.sweep(net, coalesce=True) as sweep:
            assert same(sweep.map(net, items), expected)
            assert 1 < sweep.statistics().max_in_flight <= 3
        assert penstock.statistics(net).num_joint_calls > 0


def test_those_who_start_while_a_site_is_open_are_together_there() -> None:
    """All but the first, who goes ahead and shows what each will hold."""
    net = whole_net()
    items = whole_batches(8)
    expected = serially(net, items)
    with roomy(net):
        assert same(swept(net, net, items, width=None), expected)
        statistics = penstock.statistics(net)
    assert statistics.num_joint_calls == 3 * 2
    assert statistics.num_joint_rows >= 2 * (7 * 4 + 8 * 2)


@pytest.mark.parametrize("width", [None, 3])
def test_batches_are_taken_under_the_callers_own_state(width: int | None) -> None:
    net = whole_net()
    seen: set[tuple[bool, bool]] = set()

    def lazily() -> Iterator[torch.Tensor]:
        for x in whole_batches(9):
            seen.add((torch.is_inference_mode_enabled(), torch.is_grad_enabled()))
            yield x

    expected = serially(net, whole_batches(9))
    with roomy(net), penstock.sweep(net, width=width, coalesce=True) as sweep:
        assert same(sweep.map(net, lazily()), expected)
    assert seen == {(False, True)}

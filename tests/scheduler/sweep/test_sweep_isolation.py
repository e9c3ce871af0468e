"""What one micro-batch sets, draws or keeps is its own: others and the caller never
see it, and it finds everything as it left it."""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode

import penstock
import zoo
from nets import WIDTH, Block, Net, batches, make, same, serially, streamed
from penstock import Policy
from penstock.io.errors import PenstockError

pytestmark = pytest.mark.usefixtures("no_leaks")


@pytest.fixture(scope="module")
def net() -> Iterator[Any]:
    """One streamed model for all tests here that only look at what is around it."""
    with streamed(make(Net, 3)) as module:
        module(batches(1)[0])  # what stays open is open now
        yield module


def surroundings() -> dict[str, Any]:
    """The state that torch keeps for the thread and a sweep could change."""
    return {
        "grad": torch.is_grad_enabled(),
        "inference": torch.is_inference_mode_enabled(),
        "autocast": torch.is_autocast_enabled("cpu"),
        "autocast dtype": torch.get_autocast_dtype("cpu"),
        "default dtype": torch.get_default_dtype(),
        "device": torch.empty(0).device.type,
        "function modes": torch.overrides._len_torch_function_stack(),  # type: ignore[attr-defined]
        "dispatch modes": torch._C._len_torch_dispatch_stack(),
        "math only": not torch._C._get_flash_sdp_enabled(),
    }


@pytest.fixture(autouse=True)
def nothing_leaks_into_the_caller() -> Iterator[None]:
    before = surroundings()
    yield
    assert surroundings() == before


class CountingMode(TorchDispatchMode):  # type: ignore[no-untyped-call]
    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.num_calls = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        self.num_calls += 1
        return func(*args, **(kwargs or {}))


@contextlib.contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


SETTINGS: dict[str, Callable[[], Any]] = {
    "no_grad": torch.no_grad,
    "enable_grad": torch.enable_grad,
    "inference_mode": torch.inference_mode,
    "no inference_mode": lambda: torch.inference_mode(False),
    "autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
    "no autocast": lambda: torch.autocast("cpu", enabled=False),
    "autocast to half": lambda: torch.autocast("cpu", dtype=torch.float16),
    "a device": lambda: torch.device("meta"),
    "a dispatch mode": CountingMode,
    "a default dtype": lambda: default_dtype(torch.float64),
    "attention kernels": lambda: sdpa_kernel(SDPBackend.MATH),
    "nothing": contextlib.nullcontext,
}


@pytest.mark.parametrize("killed", [False, True], ids=["ends", "is killed"])
@pytest.mark.parametrize("setting", SETTINGS)
def test_what_one_sets_stays_with_it(net: Any, setting: str, killed: bool) -> None:
    """Every other one holds `setting` across its calls of the model."""

    def look(index: int, steps: int) -> list[dict[str, Any]]:
        found = [surroundings()]
        x = batches(1)[0]
        with SETTINGS[setting]() if index % 2 else contextlib.nullcontext():
            for _ in range(steps):
                net(x)
                found.append(surroundings())
        return [*found, surroundings()]

    with torch.inference_mode():
        alone = [look(0, 2), look(1, 2)]
    with penstock.sweep(net, width=4) as sweep:
        if killed:
            run = sweep.run(lambda i: look(i, 2 if i == 4 else 99), [4, 0, 1, 2, 3])
            assert next(run).error is None
            run.close()
        for outcome in sweep.run(lambda i: look(i, 2), range(5)):
            assert outcome.error is None
            assert outcome.value == alone[outcome.index % 2]


def test_being_killed_inside_of_inference_mode_leaves_the_caller_as_it_was(
    net: Any,
) -> None:
    inside: list[bool] = []

    def fn(number: int) -> None:
        if number == 0:
            net(batches(1)[0])
            raise KeyboardInterrupt
        with torch.inference_mode(number % 2 == 0), torch.autocast("cpu"):
            try:
                for _ in range(9):
                    net(batches(1)[0])
            finally:  # its own surroundings while it unwinds
                inside.append(torch.is_inference_mode_enabled() == (number % 2 == 0))
                inside.append(torch.is_autocast_enabled("cpu"))

    with penstock.sweep(net) as sweep, pytest.raises(KeyboardInterrupt):
        sweep.map(fn, range(5))
    assert inside == [True] * 8


def test_the_callers_surroundings_are_inherited(net: Any) -> None:
    def look(x: torch.Tensor) -> dict[str, Any]:
        net(x)
        return surroundings()

    mode, items = CountingMode(), batches(3)
    with (
        torch.autocast("cpu", dtype=torch.bfloat16),
        torch.device("meta"),
        default_dtype(torch.float64),
        sdpa_kernel(SDPBackend.MATH),
        mode,
    ):
        mine = {**surroundings(), "inference": True, "grad": False}
        with penstock.sweep(net) as sweep:
            for outcome in sweep.run(look, items):
                assert outcome.error is None
                assert outcome.value == mine
                assert surroundings()["autocast"]
    assert mode.num_calls > 0


def test_autocast_of_the_caller_casts_inside_of_the_sweep(net: Any) -> None:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected = serially(net, batches(3))
        with penstock.sweep(net) as sweep:
            found = sweep.map(net, batches(3))
    assert found[0].dtype == torch.bfloat16
    assert same(found, expected)


def test_results_are_computed_without_gradients(net: Any) -> None:
    with penstock.sweep(net) as sweep:
        [found] = sweep.map(net, batches(1))
    assert found.is_inference()
    with penstock.sweep(net) as sweep, torch.inference_mode():
        [found] = sweep.map(net, batches(1))
    assert found.is_inference()


# Context variables.


def test_context_variables_are_each_micro_batchs_own(net: Any) -> None:
    mine: ContextVar[str] = ContextVar("mine", default="nobody's")
    mine.set("the caller's")

    def fn(name: str) -> list[str]:
        found = [mine.get()]
        mine.set(name)
        for _ in range(2):
            net(batches(1)[0])
            found.append(mine.get())
        return found

    with penstock.sweep(net) as sweep:
        for outcome in sweep.run(fn, "abc"):
            assert outcome.value == ["the caller's", *["abc"[outcome.index]] * 2]
            assert mine.get() == "the caller's"


# Random numbers.


def noisy(net: Any) -> Callable[[int], Any]:
    def fn(steps: int) -> list[Any]:
        found: list[Any] = []
        x = torch.rand(2, WIDTH)
        for _ in range(steps):
            x = nn.functional.dropout(net(x), p=0.3, training=True)
            found += [x, torch.multinomial(torch.ones(9), 3), torch.randn(3)]
        return found

    return fn


@pytest.mark.parametrize("width", [None, 1, 3])
def test_sampling_is_that_of_a_run_alone_after_its_own_seed(
    net: Any, width: int | None
) -> None:
    steps = [2, 1, 4, 3, 0, 2]
    expected = serially(noisy(net), steps, seed=40)
    with penstock.sweep(net, width=width, seed=40) as sweep:
        assert same(sweep.map(noisy(net), steps), expected)


def test_the_callers_generator_is_left_alone(net: Any) -> None:
    torch.manual_seed(7)
    before = torch.get_rng_state()
    with penstock.sweep(net, seed=0) as sweep:
        for _ in sweep.run(noisy(net), [1, 3, 2]):
            assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(torch.get_rng_state(), before)


def test_without_a_seed_one_number_is_drawn_from_the_callers_generator(
    net: Any,
) -> None:
    def sample() -> list[Any]:
        with penstock.sweep(net) as sweep:
            return sweep.map(noisy(net), [1, 2])

    torch.manual_seed(7)
    first, second = sample(), sample()
    after = torch.rand(1)
    torch.manual_seed(7)
    drawn = int(torch.randint(2**31, ()).item())
    torch.randint(2**31, ())
    assert torch.equal(torch.rand(1), after)
    assert same(first, serially(noisy(net), [1, 2], seed=drawn))
    assert not same(first, second)


def test_a_micro_batch_may_seed_itself(net: Any) -> None:
    def fn(seed: int) -> Any:
        torch.manual_seed(seed)
        first = torch.rand(3)
        net(batches(1)[0])
        return [first, torch.rand(3)]

    with penstock.sweep(net) as sweep:
        found = sweep.map(fn, [5, 6, 5])
    assert same(found[0], found[2])
    assert not same(found[0], found[1])


# What modules keep.


def check(net: Any, fn: Callable[[Any], Any], items: list[Any]) -> None:
    """Every micro-batch finds the modules as they were, and keeps what is its own."""
    expected = []
    for item in items:
        expected += serially(fn, [item])
        net.reset()
    with streamed(net):
        for width in (None, 1, 2):
            with penstock.sweep(net, width=width) as sweep:
                assert same(sweep.map(fn, items), expected)
                assert same(sweep.map(fn, items), expected)  # once learnt, too


class Recurrent(Net):
    """Blocks whose step depends on the one before; `kind` says where they keep it."""

    def __init__(self, kind: str) -> None:
        super().__init__(3)
        self.kind = kind
        self.reset()

    def reset(self) -> None:
        for part in self.modules():
            part.__dict__.pop("state", None)
            part._buffers.pop("memory", None)
            if self.kind == "none":
                part.__dict__["state"] = None
            elif self.kind == "number":
                part.__dict__["state"] = 0
            elif self.kind == "buffer":
                part.register_buffer("memory", torch.zeros(1), persistent=False)
            elif self.kind == "list":
                part.__dict__["state"] = []
            elif self.kind == "dict":
                part.__dict__["state"] = {}
            elif self.kind == "deque":
                part.__dict__["state"] = deque(maxlen=2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = self.recur(block, block(x))
        return self.recur(self, x)  # type: ignore[no-any-return]

    def recur(self, part: Any, x: Any) -> Any:
        if self.kind in ("none", "absent"):
            state = getattr(part, "state", None)
            part.state = x if state is None else x + state
            return torch.tanh(part.state)
        if self.kind == "number":
            part.state += 1
            return x * part.state
        if self.kind == "buffer":
            part.register_buffer("memory", part.memory + x.sum(), persistent=False)
            return x + part.memory
        if self.kind == "dict":
            part.state[len(part.state)] = x
            return x + sum(part.state.values())
        part.state.append(x)
        return x + sum(part.state)


KINDS = ["none", "absent", "number", "buffer", "list", "dict", "deque"]


@pytest.mark.parametrize("kind", KINDS)
def test_state_that_modules_keep_is_each_micro_batchs_own(kind: str) -> None:
    net = make(Recurrent, kind)

    def fn(steps: int) -> list[Any]:
        generator = torch.Generator().manual_seed(steps)
        return [net(torch.randn(1, WIDTH, generator=generator)) for _ in range(steps)]

    check(net, fn, [3, 1, 2, 4, 2])


def test_state_of_a_block_that_the_first_one_skipped_is_found_out_in_time() -> None:
    net = make(Recurrent, "absent")
    full = net.blocks

    def fn(item: tuple[bool, torch.Tensor]) -> Any:
        is_short, x = item
        for _ in range(3):
            for block in list(full)[:1] if is_short else full:
                x = net.recur(block, block(x))
        return x

    flags = [True, False, True, False, False]
    check(net, fn, list(zip(flags, batches(5), strict=True)))


def test_the_caller_finds_the_modules_as_it_left_them() -> None:
    net = make(Recurrent, "absent")
    with streamed(net):
        net(batches(1)[0])
        mine = [part.__dict__.get("state") for part in net.modules()]
        with penstock.sweep(net) as sweep:
            sweep.map(lambda n: [net(x) for x in batches(n)], [2, 3])
        assert all(
            now is then
            for now, then in zip(
                (part.__dict__.get("state") for part in net.modules()),
                mine,
                strict=True,
            )
        )


def test_what_the_caller_sets_between_runs_is_what_all_see() -> None:
    net = make(Recurrent, "absent")

    def fn(x: torch.Tensor) -> Any:
        net(x)
        return net.scale

    with streamed(net), penstock.sweep(net) as sweep:
        for scale in (1, 2):
            net.scale = scale
            assert sweep.map(fn, batches(3)) == [scale] * 3
            assert net.scale == scale


def test_the_callers_own_calls_between_outcomes_keep_their_state() -> None:
    net = make(Recurrent, "absent")
    x = batches(1)[0]

    def steps(number: int) -> list[Any]:
        return [net(x) for _ in range(number)]

    expected = serially(steps, [4])[0]
    net.reset()
    with streamed(net), penstock.sweep(net) as sweep:
        sweep.map(steps, [2, 2])  # what modules keep is learnt
        mine = []
        with torch.inference_mode():
            for outcome in sweep.run(steps, [1, 2, 3, 4]):
                mine.append(net(x))
                assert same(outcome.value, expected[: outcome.index + 1])
    assert same(mine, expected)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama", "llava"])
def test_hidden_states_that_are_first_asked_for_in_a_sweep_are_those_asked_for(
    name: str, tmp_path: Path
) -> None:
    """transformers hooks the blocks when it is first asked, and marks the model."""
    zoo.save_checkpoint(name, tmp_path)
    items = [zoo.inputs(name, seed=seed) for seed in range(3)]

    def states(model: Any) -> Callable[[Any], Any]:
        def fn(inputs: Any) -> Any:
            found = model(**inputs, output_hidden_states=True)
            return [found.logits, found.hidden_states]

        return fn

    policy = Policy(device_memory=1 << 20, resident_below=1)
    with penstock.load(tmp_path, policy) as model:
        expected = serially(states(model), items)
    with penstock.load(tmp_path, policy) as model, penstock.sweep(model) as sweep:
        found = sweep.map(states(model), items)
        assert sweep.statistics().max_in_flight == 3
    assert same(found, expected)


class WritingInPlace(Net):
    """Keeps its cache in a buffer that it writes to."""

    cache: torch.Tensor

    def __init__(self) -> None:
        super().__init__(3)
        self.register_buffer("cache", torch.zeros(2, WIDTH), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x)
            self.cache += x
        return x + self.cache


def test_a_buffer_written_in_place_is_refused_where_others_would_read_it() -> None:
    net = make(WritingInPlace)
    expected = serially(net, batches(3))
    net.cache.zero_()
    with streamed(net):
        with (
            penstock.sweep(net) as sweep,
            pytest.raises(PenstockError, match=r"WritingInPlace\.cache.*width=1"),
        ):
            sweep.map(net, batches(3))
        net.cache.zero_()
        with penstock.sweep(net, width=1) as sweep:
            assert same(sweep.map(net, batches(3)), expected)


def test_two_modules_that_share_a_list_share_it_in_every_micro_batch() -> None:
    class Listing(Block):
        def __init__(self, seen: list[float]) -> None:
            super().__init__()
            self.seen = seen

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.seen.append(float(x.sum()))
            return super().forward(x) + len(self.seen) + sum(self.seen)

    class Row(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            seen: list[float] = []
            self.blocks = nn.ModuleList(Listing(seen) for _ in range(3))

        def reset(self) -> None:
            for block in self.blocks:
                block.seen.clear()  # type: ignore[operator,union-attr]

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for block in self.blocks:
                x = block(x)
            return x

    net = make(Row)
    check(net, lambda x: net(net(x)), batches(4))

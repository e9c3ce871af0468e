"""What torch keeps for a thread is taken off it whole and put back as it was."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from penstock.scheduler.sweep.thread_state import ThreadState


class Passing(TorchDispatchMode):  # type: ignore[no-untyped-call]
    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        return func(*args, **(kwargs or {}))


def dispatching() -> Any:
    return Passing()  # type: ignore[no-untyped-call]


class PassingFunctions(TorchFunctionMode):
    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        return func(*args, **(kwargs or {}))


def seen() -> tuple[Any, ...]:
    """The thread's state as the running code sees it."""
    return (
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        torch.is_autocast_enabled("cpu"),
        torch.get_autocast_dtype("cpu"),
        torch.is_autocast_cache_enabled(),
        torch.get_default_dtype(),
        torch._C._get_flash_sdp_enabled(),
        torch._C._get_mem_efficient_sdp_enabled(),
        torch._C._get_math_sdp_enabled(),
        tuple(map(id, torch.utils._python_dispatch._get_current_dispatch_mode_stack())),
        tuple(map(id, torch.overrides._get_current_function_mode_stack())),  # type: ignore[no-untyped-call]
        torch.get_rng_state().tolist(),
        torch.mm(torch.ones(1, 1), torch.ones(1, 1)).dtype,
        (torch.ones(1, requires_grad=True) * 2).requires_grad,
        (torch.ones(1) * 2).is_inference(),
    )


@pytest.fixture(autouse=True)
def untouched() -> Iterator[tuple[Any, ...]]:
    before = seen()
    yield before
    assert seen() == before


@contextlib.contextmanager
def doubles() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


SURROUNDINGS: dict[str, Callable[[], Any]] = {
    "nothing": contextlib.nullcontext,
    "no_grad": torch.no_grad,
    "inference_mode": torch.inference_mode,
    "autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
    "autocast without its cache": lambda: torch.autocast("cpu", cache_enabled=False),
    "a function mode": PassingFunctions,
    "a device": lambda: torch.device("cpu"),
    "a dispatch mode": dispatching,
    "doubles": doubles,
    "one attention kernel": lambda: sdpa_kernel(SDPBackend.MATH),
}


@pytest.mark.parametrize("inner", SURROUNDINGS)
@pytest.mark.parametrize("outer", SURROUNDINGS)
def test_a_flow_finds_everything_as_it_left_it(outer: str, inner: str) -> None:
    """Whatever ran in between, and however that left the thread."""
    mine, other = ThreadState(("cpu",)), ThreadState(("cpu",))
    with SURROUNDINGS[outer]():
        before = seen()
        mine.suspend()
        other.start_like(mine, seed=1)
        with SURROUNDINGS[inner]():
            during = seen()
            other.suspend()
            mine.resume()
            assert seen() == before
            mine.suspend()
            other.resume()
            assert seen() == during
        mine.resume()
        assert seen() == before


def test_between_two_flows_the_thread_is_plain() -> None:
    state = ThreadState(("cpu",))
    with (
        torch.autocast("cpu"),
        torch.device("meta"),
        dispatching(),
        torch.enable_grad(),
    ):
        state.suspend()
        assert torch.is_inference_mode_enabled()
        assert not torch.is_autocast_enabled("cpu")
        assert torch._C._len_torch_dispatch_stack() == 0
        assert torch.empty(1).device.type == "cpu"
        state.resume()
        assert torch.empty(1).device.type == "meta"


def test_a_new_flow_begins_like_the_other_but_in_inference_mode() -> None:
    loop, flow = ThreadState(("cpu",)), ThreadState(("cpu",))
    with torch.autocast("cpu", dtype=torch.float16), torch.device("meta"), doubles():
        loop.suspend()
        flow.start_like(loop, seed=3)
        assert torch.is_inference_mode_enabled()
        assert torch.is_autocast_enabled("cpu")
        assert torch.get_autocast_dtype("cpu") == torch.float16
        assert torch.get_default_dtype() == torch.float64
        assert torch.empty(1).device.type == "meta"
        loop.resume()
        assert not torch.is_inference_mode_enabled()


def test_a_new_flow_samples_as_after_its_own_seed() -> None:
    loop = ThreadState(("cpu",))
    flows = [ThreadState(("cpu",)) for _ in range(3)]
    drawn: list[list[float]] = [[] for _ in flows]
    for index, flow in enumerate(flows):
        loop.suspend()
        flow.start_like(loop, seed=index)
        drawn[index] += torch.rand(2).tolist()
        flow.suspend()
        loop.resume()
        torch.rand(index + 1)  # the loop draws, too
    for index in (2, 0, 1):
        loop.suspend()
        flows[index].resume()
        drawn[index] += torch.randn(2).tolist()
        loop.resume()
    for index, numbers in enumerate(drawn):
        generator = torch.Generator().manual_seed(index)
        alone = torch.rand(2, generator=generator).tolist()
        assert numbers == alone + torch.randn(2, generator=generator).tolist()
    torch.manual_seed(0)  # for `untouched`


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def test_a_flow_that_ends_in_any_mode_does_not_spoil_the_next() -> None:
    """It was killed: none of its `with` blocks was left."""
    loop, flow = ThreadState(("cpu",)), ThreadState(("cpu",))
    before = seen()
    loop.suspend()
    flow.start_like(loop, seed=0)
    torch._C._push_on_torch_dispatch_stack(dispatching())
    torch._C._push_on_torch_function_stack(PassingFunctions())
    torch.set_grad_enabled(True)
    torch.set_autocast_enabled("cpu", True)
    torch.set_default_dtype(torch.float64)
    loop.resume()
    assert seen() == before


def test_resume_may_be_called_again_and_then_does_nothing() -> None:
    state = ThreadState(("cpu",))
    before = seen()
    state.resume()
    state.suspend()
    state.resume()
    with torch.no_grad():
        state.resume()
        assert not torch.is_grad_enabled()
    assert seen() == before

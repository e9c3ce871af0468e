"""Random numbers of the simulated GPU are the CPU's, whenever kernels run."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from sim_device import SimGpu

pytestmark = pytest.mark.simgpu
GPU = "simgpu:0"
Draw = Callable[[torch.Generator, str], torch.Tensor]
DRAWS: dict[str, Draw] = {
    "rand": lambda g, d: torch.rand(40, generator=g, device=d),
    "randn": lambda g, d: torch.randn(40, generator=g, device=d),
    "randint": lambda g, d: torch.randint(9, (40,), generator=g, device=d),
    "randperm": lambda g, d: torch.randperm(40, generator=g, device=d),
    "exponential": lambda g, d: torch.empty(40, device=d).exponential_(generator=g),
    "bernoulli": lambda g, d: torch.full((40,), 0.3, device=d).bernoulli(generator=g),
    "multinomial": lambda g, d: torch.multinomial(
        torch.arange(1.0, 9.0, device=d), 4, generator=g
    ),
    "with replacement": lambda g, d: torch.multinomial(
        torch.arange(1.0, 9.0, device=d), 40, True, generator=g
    ),
    "poisson": lambda g, d: torch.poisson(torch.full((9,), 3.0, device=d), generator=g),
}


@pytest.mark.parametrize("name", DRAWS)
def test_a_generator_draws_what_the_cpus_draws(simgpu: SimGpu, name: str) -> None:
    simgpu.schedule(1)
    ours, theirs = torch.Generator(GPU), torch.Generator()
    for generator in (ours, theirs):
        generator.manual_seed(7)
    for _ in range(3):
        drawn = DRAWS[name](ours, GPU)
        assert torch.equal(drawn.cpu(), DRAWS[name](theirs, "cpu"))
    assert torch.equal(ours.get_state(), theirs.get_state())


def test_each_device_has_a_generator_that_seeds_and_states_are_of(
    simgpu: SimGpu,
) -> None:
    module = torch.get_device_module("simgpu")
    torch.manual_seed(3)
    first = torch.rand(4, device=GPU)
    assert torch.equal(first.cpu(), torch.rand(4, device="simgpu:1").cpu())
    state = module.get_rng_state(GPU)
    second = torch.rand(4, device=GPU)
    module.set_rng_state(state, GPU)
    assert torch.equal(second, torch.rand(4, device=GPU))
    assert module.initial_seed() == 3
    assert len(module.default_generators) == 2


def test_the_order_of_calls_counts_and_not_when_they_run(simgpu: SimGpu) -> None:
    def drawn() -> list[torch.Tensor]:
        torch.manual_seed(3)
        side = torch.Stream(GPU)
        with simgpu.held(torch.accelerator.current_stream()):
            first = torch.rand(4, device=GPU)
            with side:
                second = torch.rand(4, device=GPU)
                side.synchronize()
        return [first.cpu(), second.cpu()]

    torch.manual_seed(3)
    expected = [torch.rand(4), torch.rand(4)]
    assert all(map(torch.equal, drawn(), expected))


def test_a_generator_belongs_to_a_device(simgpu: SimGpu) -> None:
    with pytest.raises(RuntimeError, match="device type"):
        torch.rand(4, generator=torch.Generator(), device=GPU)

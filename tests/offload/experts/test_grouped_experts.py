"""Pieces of experts are computed by grouped products, where these are the same."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import Qwen3MoeConfig
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

from penstock.offload.experts.grouped_experts import GroupedExperts

EXPERTS, PAIRS = 4, 12
ENDS = torch.tensor([3, 3, 7, 12], dtype=torch.int32)  # one expert has no pairs
CHOSEN = torch.tensor([0] * 3 + [2] * 4 + [3] * 5).unsqueeze(-1)


@pytest.fixture
def module() -> Any:
    config = Qwen3MoeConfig(
        hidden_size=32, moe_intermediate_size=48, num_experts=EXPERTS
    )
    config._experts_implementation = "grouped_mm"
    torch.manual_seed(0)
    kind: Any = Qwen3MoeExperts  # it has no types
    made = kind(config).bfloat16()
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return made


@pytest.fixture
def states() -> torch.Tensor:
    return torch.randn(PAIRS, 32).bfloat16()


def counted(module: Any, states: torch.Tensor, calls: list[int]) -> Callable[[], Any]:
    def by_module() -> Any:
        calls.append(1)
        ones = torch.ones(PAIRS, 1, dtype=states.dtype)
        return module(states, CHOSEN, ones)

    return by_module


def test_the_first_piece_alone_is_computed_by_the_module_too(
    module: Any, states: torch.Tensor
) -> None:
    calls: list[int] = []
    by_module = counted(module, states, calls)
    grouped = GroupedExperts(module)
    with torch.inference_mode():
        expected = by_module()
        made = [
            grouped.compute(dict(module.named_parameters()), states, ENDS, by_module)
            for _ in range(3)
        ]
    assert len(calls) == 2
    assert all(torch.equal(each, expected) for each in made)


def test_a_module_that_does_something_else_computes_its_pieces_itself(
    module: Any, states: torch.Tensor
) -> None:
    grouped = GroupedExperts(module)
    calls: list[int] = []
    by_module = counted(module, states, calls)
    with torch.inference_mode():
        for _ in range(3):
            found = grouped.compute(
                dict(module.named_parameters()), states, ENDS, lambda: by_module() * 2
            )
            assert torch.equal(found, by_module() * 2)
    assert len(calls) == 6


def test_biases_are_left_to_the_module(module: Any, states: torch.Tensor) -> None:
    module.has_bias = True
    grouped = GroupedExperts(module)
    zeros = torch.zeros(PAIRS, 32)
    with torch.inference_mode():
        assert grouped.compute({}, states, ENDS, lambda: zeros) is zeros

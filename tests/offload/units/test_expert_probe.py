"""Only experts that compute by themselves are cut, whatever their class is called."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import Llama4TextConfig
from transformers.models.llama4.modeling_llama4 import Llama4TextExperts

from penstock.offload.units.expert_probe import num_dense_experts, piece_of_experts

Tensor = torch.Tensor


class Stack(nn.Module):
    """Experts that compute by themselves."""

    def __init__(self) -> None:
        super().__init__()
        self.num_experts = 6
        self.up = nn.Parameter(torch.randn(6, 8, 10))
        self.down = nn.Parameter(torch.randn(6, 10, 8))

    def forward(self, rows: Tensor) -> Tensor:
        states = rows.view(self.num_experts, -1, 8)
        made = self.between(torch.bmm(states, self.up))
        return torch.bmm(made, self.down).reshape(-1, 8)

    def between(self, states: Tensor) -> Tensor:
        return nn.functional.silu(states) * 2


class Mixed(Stack):
    """Experts that see each other."""

    def __init__(self, what: str) -> None:
        super().__init__()
        self.what = what

    def between(self, states: Tensor) -> Tensor:
        if self.what == "softmax":
            return states.softmax(0)
        if self.what == "order":
            return states.flip(0)
        if self.what == "sum":
            return states + states.sum(0)
        if self.what == "first":
            return states * states[:1]
        if self.what == "number":
            return states * self.num_experts
        if self.what == "random":
            return nn.functional.dropout(states, 0.5, training=True)
        return states.mul_(2)


def test_experts_that_compute_by_themselves_are_found() -> None:
    experts = Stack()
    assert num_dense_experts(experts) == 6
    rows = torch.randn(12, 8)
    piece = piece_of_experts(Stack, experts, 2, 6)
    few = {"up": experts.up[2:4], "down": experts.down[2:4]}
    piece.__dict__["_parameters"] = few
    torch.testing.assert_close(piece(rows[4:8]), experts(rows)[4:8])
    assert experts.num_experts == 6


def test_those_of_llama_4_are_found_without_memory() -> None:
    """In the sizes of Maverick."""
    config = Llama4TextConfig(num_local_experts=128)
    with torch.device("meta"):
        assert num_dense_experts(Llama4TextExperts(config)) == 128


@pytest.mark.parametrize(
    "what", ["softmax", "order", "sum", "first", "number", "random", "in place"]
)
def test_experts_that_see_each_other_stay_together(what: str) -> None:
    assert num_dense_experts(Mixed(what)) is None


def test_other_modules_are_no_experts() -> None:
    assert num_dense_experts(nn.Linear(8, 8)) is None
    assert num_dense_experts(nn.Conv1d(8, 8, 3)) is None
    assert num_dense_experts(nn.Bilinear(8, 8, 8)) is None

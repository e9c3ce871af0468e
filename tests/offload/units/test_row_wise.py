"""Modules that are alike are probed once; those that may differ are not alike."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

from penstock.offload.units import row_wise
from penstock.offload.units.row_wise import find_row_wise
from penstock.offload.units.sites import FoundSite, ModelDivision


class Mlp(nn.Module):
    def __init__(self, act: Callable[[torch.Tensor], torch.Tensor], scale: float = 1.0):
        super().__init__()
        self.up, self.down = nn.Linear(8, 12), nn.Linear(12, 8)
        self.act, self.scale = act, scale

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        made: torch.Tensor = self.down(self.act(self.up(states)) * self.scale)
        return made


class Block(nn.Module):
    def __init__(self, mlp: Mlp) -> None:
        super().__init__()
        self.mlp = mlp


def mixes(states: torch.Tensor) -> torch.Tensor:
    return states - states.mean(0, keepdim=True)


def found(mlps: list[Mlp]) -> list[nn.Module]:
    """The row-wise modules among `mlps`, each in a block of its own."""
    sites = [FoundSite(str(i), Block(mlp).eval()) for i, mlp in enumerate(mlps)]
    modules = [each.module for each in find_row_wise(ModelDivision(tuple(sites), ()))]
    return [mlp for mlp in mlps if any(module is mlp for module in modules)]


def test_equal_modules_are_probed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    probed: list[nn.Module] = []

    def probe(module: nn.Module) -> bool:
        probed.append(module)
        return True

    monkeypatch.setattr(row_wise, "takes_rows_to_rows", probe)
    mlps = [Mlp(torch.relu) for _ in range(5)]
    assert found(mlps) == mlps
    assert probed == mlps[:1]


def test_modules_that_may_differ_are_told_apart() -> None:
    fine, other, mixing = Mlp(torch.relu), Mlp(torch.relu, 2.0), Mlp(mixes)
    hooked, trained, replaced = (Mlp(torch.relu) for _ in range(3))
    hooked.up.register_forward_hook(lambda module, args, output: mixes(output))
    setattr(replaced.up, "forward", mixes)  # noqa: B010
    assert found([fine, other, mixing, hooked, replaced]) == [fine, other]
    sites = [FoundSite("0", Block(fine).eval()), FoundSite("1", Block(trained).train())]
    modules = [m.module for m in find_row_wise(ModelDivision(tuple(sites), ()))]
    assert fine in modules
    assert trained not in modules

"""What takes rows to rows is found without running it, and nothing else is."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import zoo
from penstock.offload.units.row_probe import takes_rows_to_rows

WIDTH = 8
NAMES = ["llama", "gpt2", "phi3", "gemma2", "t5", "bert", "qwen2_moe", "mamba", "vit"]


class Block(nn.Module):
    """Two products and, between them, what is under test."""

    def __init__(self, between: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.into = nn.Linear(WIDTH, WIDTH)
        self.out = nn.Linear(WIDTH, WIDTH)
        self.scale = nn.Parameter(torch.ones(WIDTH))
        self.table = nn.Parameter(torch.ones(5, WIDTH))
        self.between = between

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out(self.between(self.into(x)))  # type: ignore[no-any-return]


APART = {
    "pointwise": lambda x: nn.functional.silu(x) * 2 + x.pow(2),
    "gelu": lambda x: nn.functional.gelu(x, approximate="tanh"),
    "cast": lambda x: x.double().clamp(-1, 1).float(),
    "norm": lambda x: x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6),
    "reshaped": lambda x: x.reshape(-1, WIDTH).relu().view(x.shape),
}
MIXED = {
    "mean of the rows": lambda x: x - x.mean(0, keepdim=True),
    "mean of what is second": lambda x: x - x.mean(1, keepdim=True),
    "sum of all": lambda x: x / x.sum(),
    "softmax of rows": lambda x: x.softmax(0),
    "shift": lambda x: x.roll(1, 0),
    "running sum": lambda x: x.cumsum(-2),
    "heads": lambda x: x.view(*x.shape[:-1], 2, WIDTH // 2).flatten(-2).clone(),
    "product of rows": lambda x: (x @ x.transpose(-1, -2)) @ x,
    "in place": lambda x: x.mul_(2),
    "random": lambda x: nn.functional.dropout(x, training=True),
    "contents": lambda x: x if float(x.max()) > 0 else -x,
    "rows counted": lambda x: x * len(x) if len(x) > 5 else x,
    "even and odd": lambda x: x.relu() if x.shape[0] % 2 else x,
    "rows in a list": lambda x: x / torch.stack([x, x]).sum(),
    "rows counted by a tensor": lambda x: x / torch.tensor(x.shape[0]),
    "random beside": lambda x: x * torch.rand(()),
    "another shape": lambda x: x[..., :4].repeat_interleave(2, -1),
}


@pytest.mark.parametrize("name", APART)
def test_rows_stay_apart(name: str) -> None:
    assert takes_rows_to_rows(Block(APART[name]).eval())


@pytest.mark.parametrize("name", MIXED)
def test_rows_are_mixed_or_nobody_can_tell(name: str) -> None:
    assert not takes_rows_to_rows(Block(MIXED[name]).eval())


def test_which_weight_is_taken_must_not_depend_on_the_rows() -> None:
    block = Block(lambda x: (block.into if len(x) % 2 else block.out)(x)).eval()
    assert not takes_rows_to_rows(block)


def test_a_module_that_somebody_watches_is_not_run() -> None:
    block = Block(lambda x: x).eval()
    block.into.register_forward_hook(lambda m, args, out: None)
    assert not takes_rows_to_rows(block)


def test_halves_of_a_row_are_of_that_row() -> None:
    block = Block(lambda x: torch.mul(*x.chunk(2, dim=-1))).eval()
    block.into = nn.Linear(WIDTH, 2 * WIDTH)
    assert takes_rows_to_rows(block.eval())


def test_parameters_may_be_as_wide_as_a_row_and_no_more() -> None:
    block = Block(lambda x: x * block.scale).eval()
    assert takes_rows_to_rows(block)
    block = Block(lambda x: x + block.table).eval()
    assert not takes_rows_to_rows(block)


def test_other_arguments_products_and_modes_are_not_for_it() -> None:
    class Two(Block):
        def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
            return super().forward(x + y)

    assert not takes_rows_to_rows(Two(lambda x: x).eval())
    assert not takes_rows_to_rows(nn.SiLU().eval())
    assert not takes_rows_to_rows(Block(lambda x: x))  # it is being trained


def test_what_a_module_keeps_is_put_back() -> None:
    class Recurrent(Block):
        def __init__(self) -> None:
            super().__init__(lambda x: x)
            self.state: Any = "before"
            self.register_buffer("seen", torch.zeros(1))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.state, self.new = x, x
            self.seen = x
            return super().forward(x)

    block = Recurrent().eval()
    seen = block.seen
    assert not takes_rows_to_rows(block)
    assert block.state == "before"
    assert block.seen is seen
    assert not hasattr(block, "new")
    assert all(not p.is_meta for p in block.parameters())


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [
        name if name in NAMES else pytest.param(name, marks=pytest.mark.whole)
        for name in zoo.names()
        if not zoo.ARCHITECTURES[name].mutates
    ],
)
def test_a_module_that_passes_gives_each_row_what_it_gets_alone(name: str) -> None:
    """Every kind of module of every model, with real weights."""
    model = zoo.build(name).eval()
    kinds = {}
    for module in model.modules():
        if type(module) not in kinds and len(list(module.modules())) > 1:
            kinds[type(module)] = takes_rows_to_rows(module) and module
    for module in filter(None, kinds.values()):
        linear = next(part for part in module.modules() if hasattr(part, "weight"))
        width = getattr(linear, "in_features", None) or linear.weight.shape[0]
        groups = [torch.randn(2, n, width) for n in (3, 1, 4)]
        with torch.inference_mode():
            joint = module(torch.cat([g.flatten(0, 1) for g in groups]))
            alone = torch.cat([module(g).flatten(0, 1) for g in groups])
        torch.testing.assert_close(joint, alone)

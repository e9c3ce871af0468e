"""Keeps gradients from being computed with weights that are gone."""

from collections.abc import Iterable
from typing import Any

import torch
from torch.autograd import forward_ad
from torch.utils._pytree import tree_leaves

from ...io.errors import PenstockError


def refuse_backward(output: Any, site: str) -> None:
    """Makes a backward pass through `output`, what the module `site` gave, raise
    PenstockError before a gradient has gone through the module. Values stay the same.

    Called where gradients are recorded: by then autograd refers to the slots' bytes,
    which are other weights' when a backward pass comes.
    """

    def refuse(gradient: torch.Tensor) -> None:
        raise _no_gradients(repr(site))

    for value in tree_leaves(output):
        if isinstance(value, torch.Tensor) and value.grad_fn is not None:
            value.register_hook(refuse)  # type: ignore[no-untyped-call]


def refuse_training(output: Any, inputs: Iterable[Any]) -> None:
    """Makes what a model whose weights want gradients gave for `inputs` require one, as
    it would without Penstock, and a backward pass through it raise PenstockError."""
    if forward_ad._current_level >= 0:
        return
    given = {id(value) for value in tree_leaves(inputs)}
    for value in tree_leaves(output):
        # Subclasses and function transforms have ways of their own; a view is not the
        # only one to lead to what it views.
        is_plain = type(value) is torch.Tensor and value.is_floating_point()
        if not is_plain or id(value) in given or value.requires_grad:
            continue
        is_wrapped = torch._C._functorch.is_functorch_wrapped_tensor(value)
        if not (is_wrapped or value.is_inference() or value._is_view()):
            make: Any = _WithoutGradient.apply
            anchor = torch.empty(0, requires_grad=True, device=value.device)
            make(anchor, value)


class _WithoutGradient(torch.autograd.Function):
    """The same tensor, not another one: nothing is copied."""

    @staticmethod
    def forward(ctx: Any, anchor: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        ctx.mark_dirty(value)
        return value

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        raise _no_gradients("this model")


def _no_gradients(what: str) -> PenstockError:
    return PenstockError(
        f"gradients cannot be computed through {what}: its weights are streamed, "
        "and were gone before this backward pass. Penstock is for inference: run "
        "the model under torch.no_grad(), or train with one that is loaded whole"
    )

"""Refuses backward passes through streamed weights, which are gone by then."""

from collections.abc import Iterable
from typing import Any

import torch
from torch.autograd import forward_ad
from torch.utils._pytree import tree_leaves

from ...io.errors import PenstockError


def refuse_backward(output: Any, site: str) -> None:
    """Makes a backward pass through `output` raise PenstockError.

    `output` is what the module `site` returned; its values do not change. The error is
    raised before a gradient goes through the module. Call this if gradients are
    recorded: autograd refers to the bytes of the slots, which hold other weights at the
    time of a backward pass.
    """

    def refuse(gradient: torch.Tensor) -> None:
        raise _no_gradients(repr(site))

    for value in tree_leaves(output):
        if isinstance(value, torch.Tensor) and value.grad_fn is not None:
            value.register_hook(refuse)  # type: ignore[no-untyped-call]


def refuse_training(output: Any, inputs: Iterable[Any]) -> None:
    """Makes `output` require gradients, as it would without Penstock, and a backward
    pass through it raise PenstockError.

    `output` is what a model, some of whose weights require gradients, returned for
    `inputs`.
    """
    if forward_ad._current_level >= 0:
        return
    given = {id(value) for value in tree_leaves(inputs)}
    for value in tree_leaves(output):
        # Subclasses and function transforms record gradients in their own ways. A view
        # is not the only tensor that refers to its base.
        is_plain = type(value) is torch.Tensor and value.is_floating_point()
        if not is_plain or id(value) in given or value.requires_grad:
            continue
        is_wrapped = torch._C._functorch.is_functorch_wrapped_tensor(value)
        if not (is_wrapped or value.is_inference() or value._is_view()):
            make: Any = _WithoutGradient.apply
            anchor = torch.empty(0, requires_grad=True, device=value.device)
            make(anchor, value)


class _WithoutGradient(torch.autograd.Function):
    """Returns the same tensor, without a copy; its backward pass raises
    PenstockError."""

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

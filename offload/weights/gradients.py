"""Keeps gradients from being computed with weights that are gone."""

from typing import Any

import torch
from torch.utils._pytree import tree_leaves

from ...io.errors import PenstockError


def refuse_backward(output: Any, site: str) -> None:
    """Makes a backward pass through `output`, what the module `site` gave, raise
    PenstockError before a gradient has gone through the module. Values stay the same.

    Called where gradients are recorded: by then autograd refers to the slots' bytes,
    which are other weights' when a backward pass comes.
    """

    def refuse(gradient: torch.Tensor) -> None:
        raise PenstockError(
            f"gradients cannot be computed through {site!r}: its weights are streamed, "
            "and were gone before this backward pass. Penstock is for inference: run "
            "the model under torch.no_grad(), or train with one that is loaded whole"
        )

    for value in tree_leaves(output):
        if isinstance(value, torch.Tensor) and value.grad_fn is not None:
            value.register_hook(refuse)  # type: ignore[no-untyped-call]

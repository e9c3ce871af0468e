"""Computes a piece of experts by two grouped products, without what is the same for all
pieces.

transformers' function for experts (`grouped_mm_experts_forward`, >= 5.17) sorts pairs,
gathers their states, counts those of each expert, and sorts the results back. Here the
pairs of all pieces are in order, so that a piece is its two products with a gate
between them.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from transformers.integrations import moe

Tensor = torch.Tensor
_linear: Callable[..., Tensor] | None = getattr(moe, "_grouped_linear", None)


class GroupedExperts:
    """The computing of the pieces of one module of experts.

    Whether it gives the bits that the module gives is found out with the first piece,
    which is computed in both ways.
    """

    def __init__(self, module: Any) -> None:
        self._module = module
        self._is_same = _linear is not None and _is_plain(module)
        self._is_known = not self._is_same

    def compute(
        self,
        tensors: Mapping[str, Tensor],
        states: Tensor,
        ends: Tensor,
        by_module: Callable[[], Tensor],
    ) -> Tensor:
        """What experts make of `states`, [pairs, width], in the order of the experts.

        `tensors` are the weights, by the attributes of the module. `ends` (int32) says
        for each expert where its pairs end. `by_module` computes the same by the
        module's own forward. Returns [pairs, width].
        """
        if not self._is_same or torch.is_grad_enabled():
            return by_module()
        found = self._products(tensors, states, ends)
        if self._is_known:
            return found
        expected = by_module()
        self._is_same = found.dtype == expected.dtype and torch.equal(found, expected)
        self._is_known = True
        return expected

    def _products(
        self, tensors: Mapping[str, Tensor], states: Tensor, ends: Tensor
    ) -> Tensor:
        assert _linear is not None, "it was looked for"
        module, is_transposed = self._module, self._module.is_transposed
        up = tensors["gate_up_proj" if module.has_gate else "up_proj"]
        made = _linear(states, up, ends, None, is_transposed)
        made = module._apply_gate(made) if module.has_gate else module.act_fn(made)
        return _linear(made, tensors["down_proj"], ends, None, is_transposed)


def _is_plain(module: Any) -> bool:
    """Whether there is nothing but two products and what is between them."""
    others = ("has_bias", "has_post_expert_norm", "_is_expert_parallel")
    return not any(getattr(module, key, False) for key in others)

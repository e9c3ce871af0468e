"""What a range of the experts of one module makes of the pairs that chose them."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from .expert_pairs import ExpertCall, ExpertPairs
from .grouped_experts import GroupedExperts

Tensor = torch.Tensor


class ExpertProducts:
    """The computing of ranges of the experts of `module`, whose class is `own`.

    A range computes its (token, choice) pairs by transformers' own function, as if each
    pair was a token with one choice of weight 1.
    """

    def __init__(self, own: type, module: nn.Module) -> None:
        self._own: Any = own
        self._module = module
        self._grouped: GroupedExperts | None = None

    def of_range(
        self,
        weights: Mapping[str, Tensor],
        experts: tuple[int, int],
        call: ExpertCall,
        pairs: ExpertPairs,
    ) -> Tensor:
        """What the `experts` (the first, and the one after the last) make of their
        pairs: [pairs, width]. `weights` are those of the range, by the attributes of
        the module."""
        low, high = experts
        rows = pairs.between(low, high)
        states = call.states[pairs.tokens[rows]]

        def by_module() -> Tensor:
            chosen = pairs.experts[rows] - low
            return self.by_module(weights, states, chosen, high - low, call)

        if call.way != "sum":
            return by_module()
        if self._grouped is None:
            self._grouped = GroupedExperts(self._module)
        states = states.to(dtype_of(weights))
        return self._grouped.compute(weights, states, pairs.ends(low, high), by_module)

    def by_module(
        self,
        weights: Mapping[str, Tensor],
        states: Tensor,
        chosen: Tensor,
        num_experts: int,
        call: ExpertCall,
    ) -> Tensor:
        """What `num_experts` experts with these `weights` make of pairs, each with its
        hidden state in `states` and the number of its expert there in `chosen`: [pairs,
        width]. All are on the device that computes."""
        if call.way != "in order":  # as transformers casts them before the product
            states = states.to(dtype_of(weights))
        piece: Any = object.__new__(self._own)
        piece.__dict__.update(vars(self._module))
        piece.num_experts = num_experts
        piece.__dict__["_parameters"] = dict(weights)
        chosen, num = chosen.unsqueeze(-1), len(chosen)
        if call.way == "batched" and num == 1 < call.choices.numel():
            # torch computes a batch of one by another function: its bits differ
            states, chosen = states.expand(2, -1), chosen.expand(2, -1)
        ones = states.new_ones(chosen.shape)
        made: Tensor = self._own.forward(piece, states, chosen, ones)
        return made[:num]


def dtype_of(weights: Mapping[str, Tensor]) -> torch.dtype:
    """The dtype that experts with these `weights` compute in."""
    return next(iter(weights.values())).dtype

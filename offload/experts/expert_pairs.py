"""The (token, choice) pairs of a call of stacked experts, and how their outputs become
one. Pure.
"""

from dataclasses import dataclass, replace
from inspect import Signature
from typing import Any

import torch
from torch import nn

from ..units.experts import Way, way_of

Tensor = torch.Tensor


@dataclass(frozen=True, slots=True)
class ExpertCall:
    """One call of stacked experts. `states` is [tokens, width], `choices` and `weights`
    are [tokens, choices]."""

    states: Tensor
    choices: Tensor
    weights: Tensor
    way: Way

    @classmethod
    def of(
        cls,
        module: nn.Module,
        own: type,
        signature: Signature,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> "ExpertCall | None":
        """The call of the forward of `module`, whose class is `own`, with `args` and
        `kwargs`. None if it is not known what it computes."""
        try:
            values = signature.bind(module, *args, **kwargs).args[1:]
        except TypeError:
            return None
        if len(values) != 3 or any(type(value) is not Tensor for value in values):
            return None
        states, choices, weights = values
        way = way_of(module, own)
        is_known = (
            states.dim() == 2 == choices.dim()
            and choices.shape == weights.shape
            and 0 < len(states) == len(choices)
            and not torch.is_autocast_enabled(states.device.type)
        )
        if way is None or not is_known:
            return None
        return cls(states, choices, weights, way)


@dataclass(frozen=True, slots=True)
class ExpertPairs:
    """The (token, choice) pairs of one call, in the order of their experts."""

    experts: Tensor
    tokens: Tensor
    places: Tensor
    """The index of each pair in `choices.reshape(-1)`."""
    bounds: list[int]
    """For each expert, how many pairs those before it have; and at the end all."""
    edges: Tensor
    """The same, int32."""

    @classmethod
    def of(cls, call: ExpertCall, num_experts: int) -> "ExpertPairs":
        """As transformers orders them. Waits for the device."""
        num_tokens, num_choices = call.choices.shape
        choices = call.choices.t() if call.way == "in order" else call.choices
        # A row's place among others can change its bits: grouped_mm's is not stable.
        experts, order = torch.sort(choices.reshape(-1), stable=call.way != "sum")
        if call.way == "in order":
            tokens = order % num_tokens
            places = tokens * num_choices + order // num_tokens
        else:
            tokens, places = order // num_choices, order
        edges = torch.arange(num_experts + 1, device=experts.device)
        bounds = torch.searchsorted(experts, edges.to(experts.dtype))
        return cls(experts, tokens, places, bounds.tolist(), bounds.to(torch.int32))

    def between(self, low: int, high: int) -> slice:
        """The pairs of the experts `low` ... `high`."""
        return slice(self.bounds[low], self.bounds[high])

    def ends(self, low: int, high: int) -> Tensor:
        """Where the pairs of each of the experts `low` ... `high` end among theirs;
        int32."""
        return self.edges[low + 1 : high + 1] - self.edges[low]

    def num(self, low: int, high: int) -> int:
        return self.bounds[high] - self.bounds[low]

    def within(self, low: int, high: int) -> "ExpertPairs":
        """Those of the experts `low` ... `high`; all others have none."""
        first, last = self.bounds[low], self.bounds[high]
        bounds = [min(max(bound, first), last) for bound in self.bounds]
        return replace(self, bounds=bounds, edges=self.edges.clamp(first, last))


class ExpertOutput:
    """The output of one call, as its pairs are computed."""

    def __init__(self, call: ExpertCall, pairs: ExpertPairs) -> None:
        self._call = call
        self.pairs = pairs
        self._of_pairs: Tensor | None = None
        self._sum = torch.zeros_like(call.states) if call.way == "in order" else None

    def add(self, low: int, high: int, made: Tensor) -> None:
        """Takes what the experts `low` ... `high` made of their pairs."""
        if self._sum is None:
            self._keep(self.pairs.places[self.pairs.between(low, high)], made)
            return
        start = self.pairs.bounds[low]
        weights = self._call.weights.reshape(-1)
        for expert in range(low, high):
            rows = self.pairs.between(expert, expert + 1)
            if rows.start == rows.stop:
                continue
            weighted = made[rows.start - start : rows.stop - start]
            weighted = weighted * weights[self.pairs.places[rows], None]
            self._sum.index_add_(
                0, self.pairs.tokens[rows], weighted.to(self._sum.dtype)
            )

    def _keep(self, places: Tensor, made: Tensor) -> None:
        if self._of_pairs is None:
            num = self._call.choices.numel()
            is_all = self.pairs.bounds[-1] - self.pairs.bounds[0] == num
            make = made.new_empty if is_all else made.new_zeros
            self._of_pairs = make((num, made.shape[-1]))
        self._of_pairs[places] = made

    def result(self) -> Tensor:
        states = self._call.states
        if self._sum is not None:
            return self._sum
        if self._of_pairs is None:
            return torch.zeros_like(states)
        weighted = self._of_pairs * self._call.weights.reshape(-1).unsqueeze(-1)
        shape = (*self._call.choices.shape, weighted.shape[-1])
        return weighted.view(shape).sum(dim=1).to(states.dtype)

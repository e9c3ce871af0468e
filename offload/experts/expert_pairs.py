"""The (token, choice) pairs of a call of stacked experts, and how their outputs become
one. Pure.
"""

from dataclasses import dataclass

import torch

from ..units.experts import Way

Tensor = torch.Tensor


@dataclass(frozen=True, slots=True)
class ExpertCall:
    """One call of stacked experts. `states` is [tokens, width], `choices` and `weights`
    are [tokens, choices]."""

    states: Tensor
    choices: Tensor
    weights: Tensor
    way: Way


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


class ExpertOutput:
    """The output of one call, as its pairs are computed."""

    def __init__(self, call: ExpertCall, pairs: ExpertPairs) -> None:
        self._call = call
        self._pairs = pairs
        self._of_pairs: Tensor | None = None
        self._sum = torch.zeros_like(call.states) if call.way == "in order" else None

    def add(self, low: int, high: int, made: Tensor) -> None:
        """Takes what the experts `low` ... `high` made of their pairs."""
        if self._sum is None:
            self._keep(self._pairs.places[self._pairs.between(low, high)], made)
            return
        start = self._pairs.bounds[low]
        weights = self._call.weights.reshape(-1)
        for expert in range(low, high):
            rows = self._pairs.between(expert, expert + 1)
            if rows.start == rows.stop:
                continue
            weighted = made[rows.start - start : rows.stop - start]
            weighted = weighted * weights[self._pairs.places[rows], None]
            self._sum.index_add_(
                0, self._pairs.tokens[rows], weighted.to(self._sum.dtype)
            )

    def _keep(self, places: Tensor, made: Tensor) -> None:
        if self._of_pairs is None:
            num = self._call.choices.numel()
            is_all = self._pairs.bounds[-1] - self._pairs.bounds[0] == num
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

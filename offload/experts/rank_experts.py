"""Runs stacked experts of which this rank has a range, and other ranks the others.

All ranks route all tokens, so that each knows which pairs of a token and one of its
experts the others compute. Each computes the pairs of its own experts; then all have
what all pairs give, and weight and sum it as transformers does it for the whole.
"""

from collections.abc import Callable, Sequence
from functools import partial
from inspect import signature
from typing import Any

import torch
from torch import nn

from ...io.errors import UsageError
from ..ranks.exchange import Exchange
from ..tensor_ranks.cut_experts import CutExperts
from ..tensor_ranks.row_exchange import RowExchange
from .dense_experts import DenseExperts, compute_dense, dense_rows
from .expert_pairs import ExpertCall, ExpertOutput, ExpertPairs
from .expert_products import ExpertProducts

Tensor = torch.Tensor
Gather = Callable[[Tensor, Sequence[int]], Tensor]


class ExpertRanks:
    """What this rank has of one module of experts, and what gathers the rest."""

    def __init__(self, cut: CutExperts, gather: Gather) -> None:
        self.module = cut.module
        self.num_experts = cut.num_experts
        """Those of all ranks."""
        self.held = cut.first, cut.first + cut.num_held
        """The range that this rank holds: all that it computes, and maybe more."""
        self._cut = cut
        self._gather = gather

    def refused(self) -> UsageError:
        """The error for a call that ranks cannot divide."""
        kind = type(self._cut.module).__name__
        return UsageError(
            f"ranks: tensor cannot divide this call of {self._cut.name} ({kind}): only "
            "those with its usual tensors, of one token or more, and outside of "
            "autocast, are known; take ranks: pipeline, or ranks: gather"
        )

    def output(self, call: ExpertCall) -> "RankedOutput":
        return RankedOutput(call, self)

    @property
    def dtype(self) -> torch.dtype:
        """That of the weights, which transformers computes in."""
        return next(iter(weights_of(self._cut.module).values())).dtype

    def own(self, pairs: ExpertPairs) -> ExpertPairs:
        """Those of `pairs` that this rank computes."""
        return pairs.within(*self._cut.bounds[self._cut.rank])

    def gathered(self, pairs: ExpertPairs, made: Tensor) -> Tensor:
        """What the experts of all ranks made of `pairs`, in order, where those of this
        rank `made` [pairs, width] of its own."""
        return self._gather(made, [pairs.num(*one) for one in self._cut.bounds])

    def gathered_rows(self, made: Tensor, each: int) -> Tensor:
        """What all experts made of `each` rows, where those that this rank holds `made`
        [rows, width] of theirs."""
        bounds = self._cut.bounds
        low, high = (one - self.held[0] for one in bounds[self._cut.rank])
        sizes = [each * (last - first) for first, last in bounds]
        return self._gather(made[low * each : high * each], sizes)


def expert_ranks(exchange: Exchange | None) -> dict[nn.Module, ExpertRanks]:
    """The experts that the ranks of `exchange` divide, by their module."""
    if not isinstance(exchange, RowExchange):
        return {}
    return {
        cut.module: ExpertRanks(cut, partial(exchange.gather_pairs, index))
        for index, cut in enumerate(exchange.experts)
    }


class RankedOutput:
    """The output of one call, as the pairs of this rank are computed: see
    ExpertOutput."""

    def __init__(self, call: ExpertCall, ranks: ExpertRanks) -> None:
        self._ranks = ranks
        self._whole = ExpertOutput(call, ExpertPairs.of(call, ranks.num_experts))
        self.pairs = ranks.own(self._whole.pairs)
        """Those of this rank."""
        dtype = call.states.dtype if call.way == "in order" else ranks.dtype
        width = call.states.shape[-1]
        self._made = [call.states.new_empty((0, width), dtype=dtype)]

    def add(self, low: int, high: int, made: Tensor) -> None:
        """Takes what the experts `low` ... `high` made of their pairs; ranges come in
        ascending order."""
        self._made.append(made)

    def result(self) -> Tensor:
        made = self._ranks.gathered(self._whole.pairs, torch.cat(self._made))
        self._whole.add(0, self._ranks.num_experts, made)
        return self._whole.result()


class RankRouted:
    """The forward of one module of the class `own`, all of whose experts of this rank
    are bound."""

    def __init__(self, own: type, ranks: ExpertRanks) -> None:
        self._own = own
        self._signature = signature(getattr(own, "forward"))  # noqa: B009
        self._ranks = ranks
        self._products = ExpertProducts(own, ranks.module)

    def call_of(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> ExpertCall | None:
        return ExpertCall.of(module, self._own, self._signature, args, kwargs)

    def __call__(self, module: nn.Module, call: ExpertCall) -> Tensor:
        output, held = self._ranks.output(call), self._ranks.held
        if output.pairs.num(*held):
            weights = weights_of(module)
            made = self._products.of_range(weights, held, call, output.pairs)
            output.add(*held, made)
        return output.result()


class RankDense:
    """The forward of one module of the class `own`, each of whose experts gets tokens
    of its own. `by_pieces` computes it if not all experts of this rank are bound."""

    def __init__(
        self, own: type, ranks: ExpertRanks, by_pieces: DenseExperts | None
    ) -> None:
        self._own = own
        self._ranks = ranks
        self._by_pieces = by_pieces

    def call_of(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Tensor | None:
        """The rows of the call; None if it is not known what it computes."""
        if self._by_pieces is not None:
            return self._by_pieces.call_of(module, args, kwargs)
        return dense_rows(args, kwargs, self._ranks.num_experts)

    def __call__(self, module: nn.Module, rows: Tensor) -> Tensor:
        (first, last), num = self._ranks.held, self._ranks.num_experts
        each = len(rows) // num
        if self._by_pieces is not None:
            made = self._by_pieces(module, rows)
        else:
            weights, mine = weights_of(module), rows[first * each : last * each]
            made = compute_dense(self._own, module, weights, mine, last - first)
        return self._ranks.gathered_rows(made, each)


def weights_of(module: nn.Module) -> dict[str, Tensor]:
    """The weights of `module`, by its attributes."""
    found = module._parameters.items()
    return {key: weight for key, weight in found if weight is not None}

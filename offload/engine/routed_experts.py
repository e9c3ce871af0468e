"""Runs stacked experts piece by piece, as their pieces are loaded.

The router has chosen experts for each token. Each piece, a range of experts, computes
its (token, choice) pairs by transformers' own function, as if each pair was a token
with one choice of weight 1. Weights are applied and summed as transformers does it for
the whole: so the bits are those of the whole, where a product does not depend on how
many others are computed with it.
"""

import inspect
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from ...io.closing import Closing
from ...scheduler.slots.working_set import WorkingSet
from ...scheduler.sweep.entry import ForwardEntry
from ..experts.dense_experts import DenseExperts, ExpertPieces
from ..experts.expert_pairs import ExpertCall, ExpertOutput, ExpertPairs
from ..experts.expert_products import ExpertProducts
from ..experts.rank_experts import ExpertRanks, RankDense, RankedOutput, RankRouted
from ..units.experts import is_experts
from ..units.sites import DividedStack, FoundUnit
from ..weights.binding import Binding
from ..weights.placeholder import is_away
from .host_cache import HostCache

Tensor = torch.Tensor
Piece = tuple[int, int, int]
"""A unit, and the range of experts that it has."""


class RoutedExperts(Closing):
    """Replaces the class of the modules in `stacks`, until `close`, by one whose
    forward runs piece by piece. Calls that it does not know go to the own forward,
    whose weights are placeholders: they are loaded on the spot, as a fault.

    `in_place` are the offsets of the units that are used where they lie, in host
    memory. `cache` chooses which of the others lie there, and lets the CPU compute some
    of them beside an accelerator. `ranks` has the modules that this rank has a part
    of, in `stacks` or not: all their experts are bound then."""

    def __init__(
        self,
        stacks: Iterable[DividedStack],
        units: tuple[FoundUnit, ...],
        entry: ForwardEntry,
        working_set: WorkingSet,
        binding: Binding,
        in_place: Mapping[int, int],
        cache: HostCache,
        ranks: Mapping[nn.Module, ExpertRanks],
    ) -> None:
        self._classes: list[tuple[nn.Module, type]] = []
        ranked = dict(ranks)
        for divided in stacks:
            stack, own = divided.stack, type(divided.stack.module)
            part = ranked.pop(stack.module, None)
            first = 0 if part is None else part.held[0]
            num = stack.num_experts if part is None else part.num_experts
            of = ExpertPieces(
                divided, units, entry, working_set, binding, in_place, first, num
            )
            run: Any = DenseExperts(own, of)
            if not stack.is_dense:
                run = _Stack(own, of, entry, cache, part)
            elif part is not None:
                run = RankDense(own, part, run)
            self._replace(stack.module, run, part)
        for module, part in ranked.items():
            own = type(module)
            is_routed = is_experts(module)
            run = RankRouted(own, part) if is_routed else RankDense(own, part, None)
            self._replace(module, run, part)

    def _replace(self, module: nn.Module, run: Any, ranks: ExpertRanks | None) -> None:
        own = type(module)
        self._classes.append((module, own))
        module.__class__ = _class_of(own, run, ranks)

    def close(self) -> None:
        while self._classes:
            module, own = self._classes.pop()
            module.__class__ = own


def _class_of(own: type, run: Any, ranks: ExpertRanks | None) -> type:
    """A class like `own`, whose forward is `run` where that may be. Elsewhere, the own
    forward would compute a part only, if `ranks` have the others."""

    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        call = run.call_of(self, args, kwargs)
        if call is not None:
            return run(self, call)
        if ranks is not None:
            raise ranks.refused()
        whole: Any = own
        return whole.forward(self, *args, **kwargs)

    names = {"forward": forward, "__module__": own.__module__}
    return type(own.__name__, (own,), {**names, "__qualname__": own.__qualname__})


class _Stack:
    """The forward of one module of stacked experts."""

    def __init__(
        self,
        own: type,
        pieces: ExpertPieces,
        entry: ForwardEntry,
        cache: HostCache,
        ranks: ExpertRanks | None,
    ) -> None:
        self._own: Any = own
        forward = getattr(own, "forward")  # noqa: B009
        self._signature = inspect.signature(forward)
        self._of = pieces
        self._ranks = ranks
        self._routing = pieces.routing
        self._entry = entry
        self._cache = cache
        self._host = cache.experts
        self._units = [unit for _, each in pieces.windows for unit, *_ in each]
        self._products = ExpertProducts(own, pieces.module)

    def call_of(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> ExpertCall | None:
        """The call, if pieces give what the own forward gives; else None."""
        call = ExpertCall.of(module, self._own, self._signature, args, kwargs)
        if all(is_away(module, key) for key, _ in self._of.keys):
            return call
        return None

    def __call__(self, module: nn.Module, call: ExpertCall) -> Tensor:
        output = self._output_of(call)
        pairs = output.pairs
        needs = dict(self._chosen(pairs))
        asked = {site: self._tokens(found, pairs) for site, found in needs.items()}
        self._routing.ask(asked)
        try:
            while asked:  # dicts keep their order
                site = next(iter(asked))
                with self._of.open(site):
                    self._cache.step(self._units, self._entry.num_passes)
                    window = self._window(needs[site], call, pairs)
                    for low, high, made in window:
                        output.add(low, high, made)
                self._routing.withdraw(site, asked.pop(site))
        finally:
            for site, tokens in asked.items():
                self._routing.withdraw(site, tokens)
        return output.result()

    def _output_of(self, call: ExpertCall) -> ExpertOutput | RankedOutput:
        if self._ranks is not None:
            return self._ranks.output(call)
        return ExpertOutput(call, ExpertPairs.of(call, self._of.num))

    def _chosen(self, pairs: ExpertPairs) -> Iterator[tuple[int, list[Piece]]]:
        """The windows that have chosen experts, and their pieces that have."""
        for site, pieces in self._of.windows:
            found = [(u, low, high) for u, low, high in pieces if pairs.num(low, high)]
            if found or self._ranks is not None:  # all ranks open the same sites
                yield site, found

    def _tokens(self, pieces: Iterable[Piece], pairs: ExpertPairs) -> dict[int, int]:
        """How many tokens chose those of the pieces that have to be loaded."""
        return {
            unit: pairs.num(low, high)
            for unit, low, high in pieces
            if unit not in self._of.in_place
        }

    def _window(
        self, pieces: Sequence[Piece], call: ExpertCall, pairs: ExpertPairs
    ) -> Iterator[tuple[int, int, Tensor]]:
        """What the chosen pieces of an open window make of their pairs, in order."""
        there = self._there(pieces, call)
        if not there:
            for each in pieces:
                yield *each[1:], self._on_device(each, call, pairs)
            return
        rows = torch.cat([pairs.tokens[pairs.between(*each[1:])] for each in there])
        with self._host.sent(call.states[rows]) as arrived:
            # The device computes, once their weights are there, while the CPU does.
            made = {
                each: self._on_device(each, call, pairs)
                for each in pieces
                if each not in there
            }
            sizes = [pairs.num(*each[1:]) for each in there]
            states = torch.split(arrived(), sizes)
            on_host = [
                self._on_host(each, its, call, pairs)
                for each, its in zip(there, states, strict=True)
            ]
            back = torch.split(self._host.back(on_host), sizes)
        made.update(zip(there, back, strict=True))
        for each in pieces:
            yield *each[1:], made[each]

    def _there(self, pieces: Sequence[Piece], call: ExpertCall) -> list[Piece]:
        """The pieces of an open window that the CPU computes. None where gradients are
        recorded, as what a backward pass needs might be gone then, and none where the
        CPU would cast them."""
        records = torch.is_grad_enabled() and call.states.requires_grad
        if records or torch.is_autocast_enabled("cpu"):
            return []
        return [each for each in pieces if self._routing.is_on_host(each[0])]

    def _on_device(self, of: Piece, call: ExpertCall, pairs: ExpertPairs) -> Tensor:
        unit, low, high = of
        with self._of.loaded(unit) as tensors:
            weights = self._weights(tensors)
            return self._products.of_range(weights, (low, high), call, pairs)

    def _on_host(
        self, of: Piece, states: Tensor, call: ExpertCall, pairs: ExpertPairs
    ) -> Tensor:
        unit, low, high = of
        sizes = [pairs.num(expert, expert + 1) for expert in range(low, high)]
        self._routing.use_on_host(unit, sum(map(bool, sizes)), sum(sizes))
        experts = [expert for expert, num in enumerate(sizes) for _ in range(num)]
        chosen = torch.tensor(experts, device=states.device)
        weights = self._weights(self._host.parameters(unit))
        return self._products.by_module(weights, states, chosen, high - low, call)

    def _weights(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Those of a piece, by the attributes of the module."""
        return {key: tensors[name] for key, name in self._of.keys}

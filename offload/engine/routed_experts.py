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
from ..experts.grouped_experts import GroupedExperts
from ..units.experts import way_of
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
    of them beside an accelerator."""

    def __init__(
        self,
        stacks: Iterable[DividedStack],
        units: tuple[FoundUnit, ...],
        entry: ForwardEntry,
        working_set: WorkingSet,
        binding: Binding,
        in_place: Mapping[int, int],
        cache: HostCache,
    ) -> None:
        self._classes: list[tuple[nn.Module, type]] = []
        for divided in stacks:
            own = type(divided.stack.module)
            of = ExpertPieces(divided, units, entry, working_set, binding, in_place)
            is_dense = divided.stack.is_dense
            run = DenseExperts(own, of) if is_dense else _Stack(own, of, entry, cache)
            self._classes.append((divided.stack.module, own))
            divided.stack.module.__class__ = _class_of(own, run)

    def close(self) -> None:
        while self._classes:
            module, own = self._classes.pop()
            module.__class__ = own


def _class_of(own: type, run: Any) -> type:
    """A class like `own`, whose forward is `run` where that may be."""

    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        call = run.call_of(self, args, kwargs)
        if call is not None:
            return run(self, call)
        whole: Any = own
        return whole.forward(self, *args, **kwargs)

    names = {"forward": forward, "__module__": own.__module__}
    return type(own.__name__, (own,), {**names, "__qualname__": own.__qualname__})


class _Stack:
    """The forward of one module of stacked experts."""

    def __init__(
        self, own: type, pieces: ExpertPieces, entry: ForwardEntry, cache: HostCache
    ) -> None:
        self._own: Any = own
        forward = getattr(own, "forward")  # noqa: B009
        self._signature = inspect.signature(forward)
        self._of = pieces
        self._routing = pieces.routing
        self._entry = entry
        self._cache = cache
        self._host = cache.experts
        self._units = [unit for _, each in pieces.windows for unit, *_ in each]
        self._grouped: GroupedExperts | None = None

    def call_of(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> ExpertCall | None:
        """The call, if pieces give what the own forward gives; else None."""
        try:
            values = self._signature.bind(module, *args, **kwargs).args[1:]
        except TypeError:
            return None
        if len(values) != 3 or any(type(value) is not Tensor for value in values):
            return None
        states, choices, weights = values
        way = way_of(module, self._own)
        is_known = (
            states.dim() == 2 == choices.dim()
            and choices.shape == weights.shape
            and 0 < len(states) == len(choices)
            and not torch.is_autocast_enabled(states.device.type)
            and all(is_away(module, key) for key, _ in self._of.keys)
        )
        if way is None or not is_known:
            return None
        return ExpertCall(states, choices, weights, way)

    def __call__(self, module: nn.Module, call: ExpertCall) -> Tensor:
        pairs = ExpertPairs.of(call, self._of.num)
        output = ExpertOutput(call, pairs)
        piece: Any = object.__new__(self._own)
        piece.__dict__.update(vars(module))
        if call.way == "sum" and self._grouped is None:
            self._grouped = GroupedExperts(module)
        needs = dict(self._chosen(pairs))
        asked = {site: self._tokens(found, pairs) for site, found in needs.items()}
        self._routing.ask(asked)
        try:
            while asked:  # dicts keep their order
                site = next(iter(asked))
                with self._of.open(site):
                    self._cache.step(self._units, self._entry.num_passes)
                    window = self._window(piece, needs[site], call, pairs)
                    for low, high, made in window:
                        output.add(low, high, made)
                self._routing.withdraw(site, asked.pop(site))
        finally:
            for site, tokens in asked.items():
                self._routing.withdraw(site, tokens)
        return output.result()

    def _chosen(self, pairs: ExpertPairs) -> Iterator[tuple[int, list[Piece]]]:
        """The windows that have chosen experts, and their pieces that have."""
        for site, pieces in self._of.windows:
            found = [(u, low, high) for u, low, high in pieces if pairs.num(low, high)]
            if found:
                yield site, found

    def _tokens(self, pieces: Iterable[Piece], pairs: ExpertPairs) -> dict[int, int]:
        """How many tokens chose those of the pieces that have to be loaded."""
        return {
            unit: pairs.num(low, high)
            for unit, low, high in pieces
            if unit not in self._of.in_place
        }

    def _window(
        self, piece: Any, pieces: Sequence[Piece], call: ExpertCall, pairs: ExpertPairs
    ) -> Iterator[tuple[int, int, Tensor]]:
        """What the chosen pieces of an open window make of their pairs, in order."""
        there = self._there(pieces, call)
        if not there:
            for each in pieces:
                yield *each[1:], self._on_device(piece, each, call, pairs)
            return
        rows = torch.cat([pairs.tokens[pairs.between(*each[1:])] for each in there])
        with self._host.sent(call.states[rows]) as arrived:
            # The device computes, once their weights are there, while the CPU does.
            made = {
                each: self._on_device(piece, each, call, pairs)
                for each in pieces
                if each not in there
            }
            sizes = [pairs.num(*each[1:]) for each in there]
            states = torch.split(arrived(), sizes)
            on_host = [
                self._on_host(piece, each, its, call, pairs)
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

    def _on_device(
        self, piece: Any, of: Piece, call: ExpertCall, pairs: ExpertPairs
    ) -> Tensor:
        unit, low, high = of
        rows = pairs.between(low, high)
        with self._of.loaded(unit) as tensors:
            states = call.states[pairs.tokens[rows]]

            def by_module() -> Tensor:
                chosen = pairs.experts[rows] - low
                return self._compute(piece, tensors, states, chosen, of, call)

            if self._grouped is None or call.way != "sum":
                return by_module()
            weights = {key: tensors[name] for key, name in self._of.keys}
            states = states.to(weights[self._of.keys[0][0]].dtype)
            ends = pairs.ends(low, high)
            return self._grouped.compute(weights, states, ends, by_module)

    def _on_host(
        self,
        piece: Any,
        of: Piece,
        states: Tensor,
        call: ExpertCall,
        pairs: ExpertPairs,
    ) -> Tensor:
        unit, low, high = of
        sizes = [pairs.num(expert, expert + 1) for expert in range(low, high)]
        self._routing.use_on_host(unit, sum(map(bool, sizes)), sum(sizes))
        experts = [expert for expert, num in enumerate(sizes) for _ in range(num)]
        chosen = torch.tensor(experts, device=states.device)
        return self._compute(
            piece, self._host.parameters(unit), states, chosen, of, call
        )

    def _compute(
        self,
        piece: Any,
        tensors: Mapping[str, Tensor],
        states: Tensor,
        chosen: Tensor,
        of: Piece,
        call: ExpertCall,
    ) -> Tensor:
        """What a piece with the weights `tensors` makes of pairs, each with its hidden
        state in `states` and the number of its expert there in `chosen`: [pairs,
        width]. All are on the device that computes."""
        if call.way != "in order":  # as transformers casts them before the product
            states = states.to(tensors[self._of.keys[0][1]].dtype)
        piece.num_experts = of[2] - of[1]
        piece.__dict__["_parameters"] = {k: tensors[name] for k, name in self._of.keys}
        chosen, num = chosen.unsqueeze(-1), len(chosen)
        if call.way == "batched" and num == 1 < call.choices.numel():
            # torch computes a batch of one by another function: its bits differ
            states, chosen = states.expand(2, -1), chosen.expand(2, -1)
        ones = states.new_ones(chosen.shape)
        made: Tensor = self._own.forward(piece, states, chosen, ones)
        return made[:num]

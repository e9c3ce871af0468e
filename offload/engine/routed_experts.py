"""Runs stacked experts piece by piece, as their pieces are loaded.

The router has chosen experts for each token. Each piece, a range of experts, computes
its (token, choice) pairs by transformers' own function, as if each pair was a token
with one choice of weight 1. Weights are applied and summed as transformers does it for
the whole: so the bits are those of the whole, where a product does not depend on how
many others are computed with it.
"""

import inspect
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ...io.closing import Closing
from ...scheduler.slots.working_set import WorkingSet
from ...scheduler.sweep.entry import ForwardEntry
from ..units.experts import Way, way_of
from ..units.sites import DividedStack, FoundUnit
from ..weights.binding import Binding
from ..weights.placeholder import is_away
from .dense_experts import DenseExperts

Tensor = torch.Tensor
Piece = tuple[int, int, int]
"""A unit, and the range of experts that it has."""


class RoutedExperts(Closing):
    """Replaces the class of the modules in `stacks`, until `close`, by one whose
    forward runs piece by piece. Calls that it does not know go to the own forward,
    whose weights are placeholders: they are loaded on the spot, as a fault.

    `in_place` are the offsets of the units that are used where they lie, in host
    memory."""

    def __init__(
        self,
        stacks: Iterable[DividedStack],
        units: tuple[FoundUnit, ...],
        entry: ForwardEntry,
        working_set: WorkingSet,
        binding: Binding,
        in_place: Mapping[int, int],
    ) -> None:
        self._classes: list[tuple[nn.Module, type]] = []
        for divided in stacks:
            own = type(divided.stack.module)
            kind = DenseExperts if divided.stack.is_dense else _Stack
            run = kind(divided, own, units, entry, working_set, binding, in_place)
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


@dataclass(frozen=True, slots=True)
class _Call:
    """One call of stacked experts. `states` is [tokens, width], `choices` and `weights`
    are [tokens, choices]."""

    states: Tensor
    choices: Tensor
    weights: Tensor
    way: Way


@dataclass(frozen=True, slots=True)
class _Pairs:
    """The (token, choice) pairs of one call, in the order of their experts."""

    experts: Tensor
    tokens: Tensor
    places: Tensor
    """The index of each pair in `choices.reshape(-1)`."""
    bounds: list[int]
    """For each expert, how many pairs those before it have; and at the end all."""

    @classmethod
    def of(cls, call: _Call, num_experts: int) -> "_Pairs":
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
        return cls(experts, tokens, places, bounds.tolist())

    def between(self, low: int, high: int) -> slice:
        """The pairs of the experts `low` ... `high`."""
        return slice(self.bounds[low], self.bounds[high])

    def num(self, low: int, high: int) -> int:
        return self.bounds[high] - self.bounds[low]


class _Output:
    """The output of one call, as its pairs are computed."""

    def __init__(self, call: _Call, pairs: _Pairs) -> None:
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


class _Stack:
    """The forward of one module of stacked experts."""

    def __init__(
        self,
        divided: DividedStack,
        own: type,
        units: tuple[FoundUnit, ...],
        entry: ForwardEntry,
        working_set: WorkingSet,
        binding: Binding,
        in_place: Mapping[int, int],
    ) -> None:
        stack = divided.stack
        self._own: Any = own
        forward = getattr(own, "forward")  # noqa: B009
        self._signature = inspect.signature(forward)
        self._num = stack.num_experts
        self._keys = tuple(stack.tensors.items())
        self._windows = [
            (site, [(unit, *(units[unit].experts or (0, 0))) for unit in pieces])
            for site, pieces in divided.windows
        ]
        self._entry = entry
        self._routing = entry.open_sites.routing
        self._working_set = working_set
        self._binding = binding
        self._in_place = in_place

    def call_of(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> _Call | None:
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
            and all(is_away(module, key) for key, _ in self._keys)
        )
        if way is None or not is_known:
            return None
        return _Call(states, choices, weights, way)

    def __call__(self, module: nn.Module, call: _Call) -> Tensor:
        pairs = _Pairs.of(call, self._num)
        output = _Output(call, pairs)
        piece: Any = object.__new__(self._own)
        piece.__dict__.update(vars(module))
        needs = dict(self._chosen(pairs))
        self._routing.ask({site: self._units(pieces) for site, pieces in needs.items()})
        try:
            while needs:  # dicts keep their order
                site = next(iter(needs))
                with self._open(site):
                    for unit, low, high in needs[site]:
                        with self._loaded(unit) as tensors:
                            made = self._compute(piece, tensors, call, pairs, low, high)
                        output.add(low, high, made)
                self._routing.withdraw(site, self._units(needs.pop(site)))
        finally:
            for site, pieces in needs.items():
                self._routing.withdraw(site, self._units(pieces))
        return output.result()

    def _chosen(self, pairs: _Pairs) -> Iterator[tuple[int, list[Piece]]]:
        """The windows that have chosen experts, and their pieces that have."""
        for site, pieces in self._windows:
            found = [(u, low, high) for u, low, high in pieces if pairs.num(low, high)]
            if found:
                yield site, found

    def _units(self, pieces: Iterable[Piece]) -> tuple[int, ...]:
        """Those of the pieces that have to be loaded."""
        return tuple(unit for unit, _, _ in pieces if unit not in self._in_place)

    @contextmanager
    def _open(self, site: int) -> Iterator[None]:
        self._entry.before(site)
        try:
            yield
        finally:
            self._entry.after(site)

    @contextmanager
    def _loaded(self, unit: int) -> Iterator[Mapping[str, Tensor]]:
        """The tensors of a piece; they stay until the end of the context."""
        if unit in self._in_place:
            yield self._binding.tensors(unit, self._in_place[unit])
            return
        self._routing.use(unit)
        offset = self._working_set.acquire(unit)
        try:
            yield self._binding.tensors(unit, offset)
        finally:
            self._working_set.release(unit)

    def _compute(
        self,
        piece: Any,
        tensors: Mapping[str, Tensor],
        call: _Call,
        pairs: _Pairs,
        low: int,
        high: int,
    ) -> Tensor:
        """What the experts `low` ... `high` make of their pairs: [pairs, width]."""
        rows = pairs.between(low, high)
        states = call.states[pairs.tokens[rows]]
        if call.way != "in order":  # as transformers casts them before the product
            states = states.to(tensors[self._keys[0][1]].dtype)
        piece.num_experts = high - low
        piece.__dict__["_parameters"] = {k: tensors[name] for k, name in self._keys}
        chosen = (pairs.experts[rows] - low).unsqueeze(-1)
        num = len(chosen)
        if call.way == "batched" and num == 1 < call.choices.numel():
            # torch computes a batch of one by another function: its bits differ
            states, chosen = states.expand(2, -1), chosen.expand(2, -1)
        ones = states.new_ones(chosen.shape)
        made: Tensor = self._own.forward(piece, states, chosen, ones)
        return made[:num]

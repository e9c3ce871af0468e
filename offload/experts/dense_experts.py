"""Runs stacked experts, each of which gets tokens of its own, piece by piece.

The input has the tokens of one expert after the other (Llama 4). Each piece, a range of
experts, computes its rows by the module's own forward, whose bits are those of the
whole: torch computes each expert as one matrix of a batch.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from ...scheduler.slots.working_set import WorkingSet
from ...scheduler.sweep.entry import ForwardEntry
from ..units.expert_probe import piece_of_experts
from ..units.sites import DividedStack, FoundUnit
from ..weights.binding import Binding
from ..weights.placeholder import is_away

Tensor = torch.Tensor
_MANY = 1 << 40
"""More rows than a piece ever has: all pieces are loaded."""


class ExpertPieces:
    """The pieces of one module of stacked experts, in their windows, and how they are
    opened and loaded. Units `in_place` are used at an offset of host memory. The module
    holds the experts from `first` on, of `num` in the layer."""

    def __init__(
        self,
        divided: DividedStack,
        units: tuple[FoundUnit, ...],
        entry: ForwardEntry,
        working_set: WorkingSet,
        binding: Binding,
        in_place: Mapping[int, int],
        first: int,
        num: int,
    ) -> None:
        self.num = num
        """The experts of the layer, those of other ranks included."""
        self.num_held = divided.stack.num_experts
        self.module = divided.stack.module
        self.keys = tuple(divided.stack.tensors.items())
        """The weights' attributes of the module, and the names of their tensors."""
        self.windows = [
            (site, [(unit, *_moved(units[unit], first)) for unit in pieces])
            for site, pieces in divided.windows
        ]
        """Each window's site, and its pieces: a unit, and the range of its experts
        among those of the layer."""
        self.in_place = in_place
        self.routing = entry.open_sites.routing
        self._entry = entry
        self._working_set = working_set
        self._binding = binding

    @contextmanager
    def open(self, site: int) -> Iterator[None]:
        self._entry.before(site)
        try:
            yield
        finally:
            self._entry.after(site)

    @contextmanager
    def loaded(self, unit: int) -> Iterator[Mapping[str, Tensor]]:
        """The tensors of a piece; they stay until the end of the context."""
        if unit in self.in_place:
            yield self._binding.tensors(unit, self.in_place[unit])
            return
        self.routing.use(unit)
        offset = self._working_set.acquire(unit)
        try:
            yield self._binding.tensors(unit, offset)
        finally:
            self._working_set.release(unit)


def _moved(unit: FoundUnit, first: int) -> tuple[int, int]:
    low, high = unit.experts or (0, 0)
    return first + low, first + high


class DenseExperts:
    """The forward of one module of the class `own`, by `pieces`."""

    def __init__(self, own: type, pieces: ExpertPieces) -> None:
        self._own: Any = own
        self._pieces = pieces

    def call_of(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Tensor | None:
        """The rows of the call, if pieces give what the own forward gives; else
        None."""
        rows = dense_rows(args, kwargs, self._pieces.num)
        if all(is_away(module, key) for key, _ in self._pieces.keys):
            return rows
        return None

    def __call__(self, module: nn.Module, rows: Tensor) -> Tensor:
        each = len(rows) // self._pieces.num
        routing = self._pieces.routing
        needs: Any = {
            site: {
                unit: _MANY
                for unit, _, _ in pieces
                if unit not in self._pieces.in_place
            }
            for site, pieces in self._pieces.windows
        }
        made: list[Tensor] = []
        routing.ask(needs)
        try:
            for site, pieces in self._pieces.windows:
                with self._pieces.open(site):
                    for unit, low, high in pieces:
                        mine = rows[low * each : high * each]
                        with self._pieces.loaded(unit) as tensors:
                            made.append(self._compute(module, tensors, mine))
                routing.withdraw(site, needs.pop(site))
        finally:
            for site, units in needs.items():
                routing.withdraw(site, units)
        return torch.cat(made)

    def _compute(
        self, module: nn.Module, tensors: Mapping[str, Tensor], rows: Tensor
    ) -> Tensor:
        """What the experts of a piece make of their `rows`."""
        stacks = {key: tensors[name] for key, name in self._pieces.keys}
        return compute_dense(self._own, module, stacks, rows, self._pieces.num_held)


def dense_rows(
    args: tuple[Any, ...], kwargs: dict[str, Any], num_experts: int
) -> Tensor | None:
    """The rows of a call with `args` and `kwargs`, as many for each of `num_experts`;
    None if they are something else."""
    values = [*args, *kwargs.values()]
    if len(values) != 1 or type(values[0]) is not Tensor:
        return None
    (rows,) = values
    is_known = (
        rows.dim() == 2
        and len(rows) > 0
        and len(rows) % num_experts == 0
        and not torch.is_autocast_enabled(rows.device.type)
    )
    return rows if is_known else None


def compute_dense(
    own: Any,
    module: nn.Module,
    stacks: Mapping[str, Tensor],
    rows: Tensor,
    num_held: int,
) -> Tensor:
    """What the experts `stacks` make of their `rows`, one expert's after the other's,
    by the forward of `own`. `module` is of that class, and holds `num_held` experts."""
    num = len(next(iter(stacks.values())))
    num_rows = len(rows)
    if num == 1 and rows.device.type == "cpu" and rows.dtype == torch.float32:
        # torch computes a batch of one by another function: its bits differ
        num, rows = 2, torch.cat([rows, rows])
        stacks = {k: stack.expand(2, -1, -1) for k, stack in stacks.items()}
    piece = piece_of_experts(own, module, num, num_held)
    piece.__dict__["_parameters"] = dict(stacks)
    made: Tensor = own.forward(piece, rows)
    return made[:num_rows]

"""Puts real parameters into a model's modules while their unit is there, and the
stand-ins back before its bytes are reused."""

from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from torch import nn

from ...io.errors import PenstockError, closed
from ...io.memory.arena import Memory
from ...io.weights.host import HostTier
from ...io.weights.layout import Placed
from ...io.weights.transfer import Transfer
from ..units.sites import ModelDivision, ParameterRef, tensors_in
from .bound import BoundParameter, is_ours, replaced, written


class Binding:
    """Knows every place where a module refers to a tensor of the arena.

    Parameters are built once for each offset that a unit ever stands at, outside of
    inference mode, and swapped into `_parameters` directly: a site of nine costs about
    a microsecond.

    They require gradients as the resident model's do, because torch chooses kernels by
    that (`matmul` folds differently) and the last bit would differ. Where gradients are
    recorded they do not: streamed weights are gone by the time of a backward pass.
    """

    def __init__(
        self,
        found: ModelDivision,
        transfers: Sequence[Transfer],
        places: Mapping[str, list[ParameterRef]],
        stand_ins: Mapping[str, torch.Tensor],
        arena: Memory,
        host: HostTier | None,
    ) -> None:
        self._transfers = transfers
        self._places = places
        self._stand_ins = stand_ins
        self._arena = arena
        self._host = host
        self._is_over = False
        self._built: dict[tuple[int, int, bool], dict[str, torch.Tensor]] = {}
        self._resident: dict[str, torch.Tensor] = {}
        self._is_in_host = {
            name: self.is_in_host(index)
            for index, unit in enumerate(found.units)
            for name in unit.tensors
        }
        self._units_of_site = [
            tuple(
                index
                for index, unit in enumerate(found.units)
                if site in unit.sites and not self.is_in_host(index)
            )
            for site in range(len(found.sites))
        ]
        names = {
            (id(place.module), place.key): name
            for name, where in places.items()
            for place in where
        }
        self._names = {
            (id(place.module._parameters), place.key): name
            for name, where in places.items()
            for place in where
        }
        self._places_of_site = [
            {
                name: [
                    (part._parameters, key)
                    for part in site.module.modules()
                    for key in part._parameters
                    if names.get((id(part), key)) == name
                ]
                for name in tensors_in(site.module, names)
            }
            for site in found.sites
        ]
        self._unwatched = places.keys() - {
            name for names in self._places_of_site for name in names
        }

    def name_of(self, parameters: Mapping[str, Any], key: str) -> str:
        """The name of the tensor that a module's `parameters` hold under `key`."""
        return self._names[id(parameters), key]

    def find(self, module: nn.Module, key: str) -> str | None:
        """The name of the streamed tensor that stands at `key` in `module`."""
        return self._names.get((id(module._parameters), key))

    def accept(self, name: str) -> None:
        """The weight `name` has other values now, which stand where it was loaded: what
        somebody wrote or put there before is gone."""
        for place in self._places[name]:
            if place.is_buffer:
                continue
            current = place.module._parameters.get(place.key)
            if isinstance(current, BoundParameter) and is_ours(current, name):
                current.forgive()
            elif current is not self._stand_ins[name]:
                found = self._resident.get(name, self._stand_ins[name])
                place.module._parameters[place.key] = cast(nn.Parameter, found)

    @property
    def resident(self) -> Mapping[str, torch.Tensor]:
        """The weights that stay in memory, by name."""
        return self._resident

    def is_in_host(self, unit: int) -> bool:
        """Whether `unit` stays in host memory, where it is used as it lies."""
        return self._host is not None and unit in self._host.offsets

    def units_of_site(self, site: int) -> tuple[int, ...]:
        """The units that have to be brought for `site`."""
        return self._units_of_site[site]

    def bind(self, site: int, offsets: tuple[int, ...]) -> None:
        """The units of `site` stand at `offsets`: makes its parameters real. Raises
        PenstockError, with nothing changed, where somebody has replaced or written to
        one. Then the units have to be loaded again."""
        if self._is_over:
            raise closed()
        where = self._places_of_site[site]
        for name, places in where.items():
            stand_in = self._stand_ins[name]
            for parameters, key in places:
                current = parameters.get(key)
                if current is not stand_in:
                    self._check(current, name)
        for unit, offset in zip(self._units_of_site[site], offsets, strict=True):
            for name, tensor in self.tensors(unit, offset).items():
                for parameters, key in where.get(name, ()):
                    parameters[key] = cast(nn.Parameter, tensor)

    def unbind(self, site: int) -> None:
        """Takes the parameters of `site` away again. Raises PenstockError where one of
        them was written to or replaced: the next load would silently undo that. Then
        the units have to be loaded again."""
        error = None
        if self._is_over:  # what stands there now is whoever's who closed the model
            return
        for name, places in self._places_of_site[site].items():
            stand_in = self._stand_ins[name]
            for parameters, key in places:
                current = parameters.get(key)
                if current is not stand_in and error is None:
                    try:
                        self._check(current, name)
                    except PenstockError as found:
                        error = found
                if name not in self._resident:
                    parameters[key] = cast(nn.Parameter, stand_in)
                    if isinstance(current, BoundParameter):
                        current.settle()
        if error is not None:
            raise error

    def bind_for_ever(self, unit: int, offset: int) -> None:
        """`unit` stays at `offset`: makes its tensors real wherever they are used.
        Raises PenstockError where somebody has replaced one."""
        with torch.no_grad():  # it will still be there, whatever is recorded
            tensors = self.tensors(unit, offset)
        for name, tensor in tensors.items():
            self._check_places(name)
            self._resident[name] = tensor
            for place in self._places[name]:
                if place.is_buffer:
                    place.module._buffers[place.key] = tensor.data
                else:
                    place.module._parameters[place.key] = cast(nn.Parameter, tensor)

    def check_resident(self) -> None:
        """Raises PenstockError where somebody wrote to a weight that no site waits for:
        `unbind` looks at the others."""
        for name in self._unwatched & self._resident.keys():
            for place in self._places[name]:
                if not place.is_buffer:
                    self._check(place.module._parameters.get(place.key), name)

    def first_written(self) -> str | None:
        """The name of a weight in memory that somebody wrote to, if there is one."""
        for name in self._resident:
            for place in self._places[name]:
                current = place.module._parameters.get(place.key)
                if isinstance(current, BoundParameter) and current.was_written:
                    return name
        return None

    def wants_gradients(self, site: int) -> bool:
        """Whether a weight of `site` has `requires_grad`."""
        names = self._places_of_site[site]
        return any(self._stand_ins[name].requires_grad for name in names)

    def _check(self, current: torch.Tensor | None, name: str) -> None:
        """Raises PenstockError where `current`, which stands where the weight `name`
        was put, is not that as it was."""
        if not isinstance(current, BoundParameter) or not is_ours(current, name):
            raise replaced(name)
        if current.was_written:
            if not self._is_in_host[name]:  # that is never loaded again
                current.forgive()
            raise written(name)

    def _check_places(self, name: str) -> None:
        for place in self._places[name]:
            current = place.module._parameters.get(place.key)
            if place.is_buffer or current is self._stand_ins[name]:
                continue
            if not is_ours(current, name):
                raise replaced(name)

    def bind_host(self) -> None:
        """Makes what stays in host memory real wherever it is used."""
        if self._host is not None:
            for unit, offset in self._host.offsets.items():
                self.bind_for_ever(unit, offset)

    def tensors(self, unit: int, offset: int) -> dict[str, torch.Tensor]:
        """The tensors of `unit`, which lies at `offset`, as views, by name."""
        memory = self._arena
        if self._host is not None and self.is_in_host(unit):
            memory = self._host.memory
        key = (unit, offset, torch.is_grad_enabled())
        if key not in self._built:
            with torch.inference_mode(False):
                self._built[key] = {
                    placed.name: self._build(placed, memory, offset, is_recorded=key[2])
                    for placed in self._transfers[unit].tensors
                }
        return self._built[key]

    def poison_all(self) -> None:
        """Leaves no view of the arena in any module; the arena can be closed. What
        somebody else has put there stays. A micro-batch that is still inside of a site
        changes nothing when it leaves."""
        self._is_over = True
        for name, where in self._places.items():
            stand_in = cast(nn.Parameter, self._stand_ins[name])
            for place in where:
                if place.is_buffer:
                    buffer = place.module._buffers[place.key]
                    if buffer is not None:
                        place.module._buffers[place.key] = buffer.clone()
                elif is_ours(place.module._parameters.get(place.key), name):
                    place.module._parameters[place.key] = stand_in
        self._built.clear()
        self._resident.clear()

    def put_stand_ins(self) -> None:
        """Takes the model's own parameters away: where this begins."""
        for name, where in self._places.items():
            for place in where:
                if not place.is_buffer:
                    stand_in = cast(nn.Parameter, self._stand_ins[name])
                    place.module._parameters[place.key] = stand_in

    def poison_elsewhere(self) -> None:
        """The same in a child that was forked, which has not got the arena's memory
        and must not read it: buffers are poisoned, too."""
        for name, where in self._places.items():
            for place in where:
                module = place.module
                store: dict[str, Any] = (
                    module._buffers if place.is_buffer else module._parameters
                )
                store[place.key] = self._stand_ins.get(name)
        self._built.clear()
        self._resident.clear()

    def _build(
        self, placed: Placed, memory: Memory, offset: int, *, is_recorded: bool
    ) -> nn.Parameter:
        size = placed.dtype.itemsize
        numel = torch.Size(placed.shape).numel()
        if numel == 0:
            tensor = torch.empty(
                placed.shape,
                dtype=placed.dtype,
                device=self._stand_ins[placed.name].device,
            )
        else:
            stored = memory.tensor(offset + placed.offset, numel * size)
            tensor = stored.view(placed.dtype).view(placed.shape)
        wants_grad = self._stand_ins[placed.name].requires_grad
        wants_grad = wants_grad and not is_recorded
        return BoundParameter.of(placed.name, tensor, wants_grad)

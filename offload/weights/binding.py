"""Puts real parameters into a model's modules while their unit is there, and the
stand-ins back before its bytes are reused."""

from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from torch import nn

from ...io.arena import Memory
from ...io.errors import PenstockError
from ...io.host import HostTier
from ...io.layout import Placed
from ...io.transfer import Transfer
from ..units.sites import Found, Place, tensors_in


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
        found: Found,
        transfers: Sequence[Transfer],
        places: Mapping[str, list[Place]],
        stand_ins: Mapping[str, torch.Tensor],
        arena: Memory,
        host: HostTier | None,
    ) -> None:
        self._transfers = transfers
        self._places = places
        self._stand_ins = stand_ins
        self._arena = arena
        self._host = host
        self._built: dict[tuple[int, int, bool], dict[str, torch.Tensor]] = {}
        self._forever: set[str] = set()
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

    def name_of(self, parameters: Mapping[str, Any], key: str) -> str:
        """The name of the tensor that a module's `parameters` hold under `key`."""
        return self._names[id(parameters), key]

    def is_in_host(self, unit: int) -> bool:
        """Whether `unit` stays in host memory, where it is used as it lies."""
        return self._host is not None and unit in self._host.offsets

    def units_of_site(self, site: int) -> tuple[int, ...]:
        """The units that have to be brought for `site`."""
        return self._units_of_site[site]

    def bind(self, site: int, offsets: tuple[int, ...]) -> None:
        """The units of `site` stand at `offsets`: makes its parameters real."""
        where = self._places_of_site[site]
        for unit, offset in zip(self._units_of_site[site], offsets, strict=True):
            for name, tensor in self.tensors(unit, offset).items():
                for parameters, key in where.get(name, ()):
                    parameters[key] = cast(nn.Parameter, tensor)

    def unbind(self, site: int) -> None:
        """Takes the parameters of `site` away again. Raises PenstockError when the
        model wrote to them: the next load would silently undo that."""
        written = None
        for name, places in self._places_of_site[site].items():
            if name not in self._forever:
                stand_in = self._stand_ins[name]
                for parameters, key in places:
                    parameter = parameters[key]
                    if parameter is not None and parameter._version:
                        written = name
                    parameters[key] = cast(nn.Parameter, stand_in)
        if written is not None:
            raise PenstockError(
                f"the model writes to its weights ({written!r}), which are read again "
                "at every pass: it cannot be streamed"
            )

    def bind_for_ever(self, unit: int, offset: int) -> None:
        """`unit` stays at `offset`: makes its tensors real wherever they are used."""
        with torch.no_grad():  # it will still be there, whatever is recorded
            tensors = self.tensors(unit, offset)
        for name, tensor in tensors.items():
            self._forever.add(name)
            for place in self._places[name]:
                store = place.module._buffers if place.is_buffer else None
                if store is not None:
                    store[place.key] = tensor.data
                else:
                    place.module._parameters[place.key] = cast(nn.Parameter, tensor)

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
        """Leaves no view of the arena in any module; the arena can be closed."""
        for name, where in self._places.items():
            for place in where:
                if place.is_buffer:
                    buffer = place.module._buffers[place.key]
                    if buffer is not None:
                        place.module._buffers[place.key] = buffer.clone()
                else:
                    stand_in = cast(nn.Parameter, self._stand_ins[name])
                    place.module._parameters[place.key] = stand_in
        self._built.clear()

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

    def _build(
        self, placed: Placed, memory: Memory, offset: int, *, is_recorded: bool
    ) -> nn.Parameter:
        size = placed.dtype.itemsize
        numel = torch.Size(placed.shape).numel()
        if numel == 0:
            tensor = torch.empty(placed.shape, dtype=placed.dtype)
        else:
            stored = memory.tensor(offset + placed.offset, numel * size)
            tensor = stored.view(placed.dtype).view(placed.shape)
        wants_grad = self._stand_ins[placed.name].requires_grad
        return nn.Parameter(tensor, requires_grad=wants_grad and not is_recorded)

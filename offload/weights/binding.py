"""Puts loaded parameters into modules, and placeholders back before they are gone."""

from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from torch import nn

from ...io.errors import PenstockError, closed
from ...io.memory.arena import Memory
from ...io.weights.host import HostTier
from ...io.weights.layout import Placed
from ...io.weights.transfer import Transfer
from ..units.sites import ModelDivision
from ..units.subtrees import ParameterRef, places_in
from .bound_parameter import BoundParameter, is_ours, replaced, written


class Binding:
    """Knows every place where a module refers to a streamed tensor.

    Parameters are built once for each offset at which a unit has ever been, outside of
    inference mode. They are put into `_parameters` directly: a site with nine of them
    takes about a microsecond.

    Outside of grad mode, a parameter has the `requires_grad` of the resident model's.
    Torch chooses kernels by that (`matmul` folds differently), so the last bit would
    differ otherwise. In grad mode, a streamed parameter has `requires_grad=False`: its
    bytes are gone before a backward pass.
    """

    def __init__(
        self,
        found: ModelDivision,
        transfers: Sequence[Transfer],
        places: Mapping[str, list[ParameterRef]],
        placeholders: Mapping[str, torch.Tensor],
        arena: Memory,
        host: HostTier | None,
    ) -> None:
        self._transfers = transfers
        self._places = places
        self._placeholders = placeholders
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
        # These are not bound: who runs them asks for them.
        self._pieces = {i for i, unit in enumerate(found.units) if unit.experts}
        self._units_of_site: list[tuple[int, ...]] = [()] * len(found.sites)
        for index, unit in enumerate(found.units):
            if index not in self._pieces and not self.is_in_host(index):
                for site in unit.sites:
                    self._units_of_site[site] += (index,)
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
        self._places_of_site = [places_in(site.module, names) for site in found.sites]
        self._unwatched = places.keys() - {
            name for names in self._places_of_site for name in names
        }

    def name_of(self, parameters: Mapping[str, Any], key: str) -> str:
        """The name of the tensor that a module's `parameters` hold under `key`."""
        return self._names[id(parameters), key]

    def find(self, module: nn.Module, key: str) -> str | None:
        """The name of the streamed tensor at `key` of `module`; None if there is
        none."""
        return self._names.get((id(module._parameters), key))

    def accept(self, name: str) -> None:
        """Called when `penstock.update` has changed the weight `name`. What user code
        has written to it or put in its place is dropped."""
        for place in self._places[name]:
            if place.is_buffer:
                continue
            current = place.module._parameters.get(place.key)
            if isinstance(current, BoundParameter) and is_ours(current, name):
                current.forgive()
            elif current is not self._placeholders[name]:
                found = self._resident.get(name, self._placeholders[name])
                place.module._parameters[place.key] = cast(nn.Parameter, found)

    @property
    def resident(self) -> Mapping[str, torch.Tensor]:
        """The weights that stay in memory, by name, each in its own shape and dtype."""
        return self._resident

    def is_in_host(self, unit: int) -> bool:
        """Whether `unit` stays in host memory and is used there."""
        return self._host is not None and unit in self._host.offsets

    def units_of_site(self, site: int) -> tuple[int, ...]:
        """The units that have to be loaded for `site`."""
        return self._units_of_site[site]

    def bind(self, site: int, offsets: tuple[int, ...]) -> None:
        """Puts the parameters of `site` into its modules; its units are at `offsets` in
        the arena.

        Raises PenstockError, and changes nothing, if user code has replaced a parameter
        or written to it. Then the units have to be loaded again.
        """
        if self._is_over:
            raise closed()
        where = self._places_of_site[site]
        for name, places in where.items():
            placeholder = self._placeholders[name]
            for parameters, key in places:
                current = parameters.get(key)
                if current is not placeholder:
                    self._check(current, name)
        for unit, offset in zip(self._units_of_site[site], offsets, strict=True):
            for name, tensor in self.tensors(unit, offset).items():
                for parameters, key in where.get(name, ()):
                    parameters[key] = cast(nn.Parameter, tensor)

    def unbind(self, site: int) -> None:
        """Takes the parameters of `site` out of its modules.

        Raises PenstockError if user code has written to one of them or replaced it: the
        next load would silently undo that. Then the units have to be loaded again.
        """
        error = None
        if self._is_over:  # the model is closed: its modules are the user's
            return
        for name, places in self._places_of_site[site].items():
            placeholder = self._placeholders[name]
            for parameters, key in places:
                current = parameters.get(key)
                if current is not placeholder and error is None:
                    try:
                        self._check(current, name)
                    except PenstockError as found:
                        error = found
                if name not in self._resident:
                    parameters[key] = cast(nn.Parameter, placeholder)
                    if isinstance(current, BoundParameter):
                        current.settle()
        if error is not None:
            raise error

    def bind_for_ever(self, unit: int, offset: int) -> None:
        """Puts the tensors of `unit`, which stays at `offset`, wherever they are used.

        Raises PenstockError if user code has replaced one.
        """
        if unit in self._pieces:
            return
        with torch.no_grad():  # it stays, so a backward pass may use it
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
        """Raises PenstockError if user code has written to a weight that no site
        uses."""
        for name in self._unwatched & self._resident.keys():
            for place in self._places[name]:
                if not place.is_buffer:
                    self._check(place.module._parameters.get(place.key), name)

    def first_written(self) -> str | None:
        """The name of a resident weight that user code has written to; None if there is
        none."""
        for name in self._resident:
            for place in self._places[name]:
                current = place.module._parameters.get(place.key)
                if isinstance(current, BoundParameter) and current.was_written:
                    return name
        return None

    def wants_gradients(self, site: int) -> bool:
        """Whether a weight of `site` has `requires_grad`."""
        names = self._places_of_site[site]
        return any(self._placeholders[name].requires_grad for name in names)

    def _check(self, current: torch.Tensor | None, name: str) -> None:
        """Raises PenstockError if `current` is not the weight `name` as bound."""
        if not isinstance(current, BoundParameter) or not is_ours(current, name):
            raise replaced(name)
        if current.was_written:
            if not self._is_in_host[name]:  # that one is never loaded again
                current.forgive()
            raise written(name)

    def _check_places(self, name: str) -> None:
        for place in self._places[name]:
            current = place.module._parameters.get(place.key)
            if place.is_buffer or current is self._placeholders[name]:
                continue
            if not is_ours(current, name):
                raise replaced(name)

    def bind_host(self) -> None:
        """Puts the tensors that stay in host memory wherever they are used."""
        if self._host is not None:
            for unit, offset in self._host.offsets.items():
                self.bind_for_ever(unit, offset)

    def tensors(self, unit: int, offset: int) -> dict[str, torch.Tensor]:
        """The tensors of `unit` at `offset`, by name, in their own shapes and dtypes.
        They are views of the arena or of the host tier."""
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

    def unbind_all(self) -> None:
        """Removes all views of the arena from modules, so that it can be closed.

        What user code has put in place of a weight stays. A micro-batch that is still
        inside a site changes nothing when it leaves.
        """
        self._is_over = True
        for name, where in self._places.items():
            placeholder = cast(nn.Parameter, self._placeholders[name])
            for place in where:
                if place.is_buffer:
                    buffer = place.module._buffers[place.key]
                    if buffer is not None:
                        place.module._buffers[place.key] = buffer.clone()
                elif is_ours(place.module._parameters.get(place.key), name):
                    place.module._parameters[place.key] = placeholder
        self._built.clear()
        self._resident.clear()

    def put_placeholders(self) -> None:
        """Replaces the model's own parameters by placeholders, at the beginning."""
        for name, where in self._places.items():
            for place in where:
                if not place.is_buffer:
                    placeholder = cast(nn.Parameter, self._placeholders[name])
                    place.module._parameters[place.key] = placeholder

    def unbind_in_child(self) -> None:
        """Puts placeholders in place of all streamed tensors, buffers included. Called
        in a forked child, which has no arena."""
        for name, where in self._places.items():
            for place in where:
                module, is_buffer = place.module, place.is_buffer
                store: Any = module._buffers if is_buffer else module._parameters
                store[place.key] = self._placeholders.get(name)
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
                device=self._placeholders[placed.name].device,
            )
        else:
            stored = memory.tensor(offset + placed.offset, numel * size)
            tensor = stored.view(placed.dtype).view(placed.shape)
        wants_grad = self._placeholders[placed.name].requires_grad
        wants_grad = wants_grad and not is_recorded
        return BoundParameter.of(placed.name, tensor, wants_grad)

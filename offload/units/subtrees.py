"""Knows the tensors that each module of a model uses, children included."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn


@dataclass(frozen=True, slots=True)
class ParameterRef:
    """A place where a module refers to a tensor: its attribute `key`."""

    module: nn.Module
    key: str
    is_buffer: bool = False

    @property
    def requires_grad(self) -> bool:
        parameter = self.module._parameters.get(self.key)
        return parameter is not None and parameter.requires_grad


class Subtrees:
    """The names of the tensors in each part of `model`, worked out once.

    `places` says where each tensor is used, by name.
    """

    def __init__(
        self, model: nn.Module, places: Mapping[str, list[ParameterRef]]
    ) -> None:
        self._names = {
            (id(p.module), p.key): name for name, ps in places.items() for p in ps
        }
        self._found: dict[int, dict[str, None]] = {}
        self._model = model
        """Kept alive: ids of modules that are gone are given to others."""
        self._visit(model)

    def tensors_in(self, module: nn.Module) -> Mapping[str, None]:
        """The names of the parameters used in `module`, each once, in order."""
        return self._found[id(module)]

    def sizes(self, nbytes: Mapping[str, int]) -> set[int]:
        """The sizes of all modules, in bytes, if tensors have `nbytes`."""
        return {sum(nbytes[name] for name in names) for names in self._found.values()}

    def name_of(self, module: nn.Module, key: str) -> str | None:
        """The name of the tensor that `module` has as `key`; None if it has none."""
        return self._names.get((id(module), key))

    def _visit(self, module: nn.Module) -> dict[str, None]:
        found = self._found.get(id(module))
        if found is not None:
            return found
        found = self._found[id(module)] = {}
        for key in module._parameters:
            if (name := self._names.get((id(module), key))) is not None:
                found[name] = None
        for child in module._modules.values():
            if child is not None:
                found.update(self._visit(child))
        return found


def places_in(
    module: nn.Module, names: Mapping[tuple[int, str], str]
) -> dict[str, list[tuple[dict[str, Any], str]]]:
    """The `_parameters` and the key of each place in `module`, by the tensor's name."""
    found: dict[str, list[tuple[dict[str, Any], str]]] = {}
    for part in module.modules():
        for key in part._parameters:
            if (name := names.get((id(part), key))) is not None:
                found.setdefault(name, []).append((part._parameters, key))
    return found

"""Keeps tensors that are not streamed on the device: rotary tables, masks, and
parameters that the model makes itself."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from ...io.closing import Closing
from ...io.devices.device import Device
from ..units.subtrees import ParameterRef
from ..weights.placeholder import StreamedParameter


class MovedTensors(Closing):
    """Moves the buffers and parameters of `model` to `device`, except those whose names
    are in `streamed`.

    `close` restores the original ones. A tensor that several modules share stays
    shared.
    """

    def __init__(
        self, model: nn.Module, device: torch.device, streamed: frozenset[str]
    ) -> None:
        self._before: list[tuple[dict[str, Any], str, torch.Tensor]] = []
        moved: dict[int, torch.Tensor] = {}
        for module_name, module in model.named_modules():
            stores: tuple[dict[str, Any], ...] = (module._buffers, module._parameters)
            for store in stores:
                for key, tensor in store.items():
                    name = f"{module_name}.{key}" if module_name else key
                    has_values = not isinstance(tensor, StreamedParameter | None)
                    if not has_values or name in streamed or tensor.device == device:
                        continue
                    self._before.append((store, key, tensor))
                    if id(tensor) not in moved:
                        moved[id(tensor)] = _moved(tensor, device)
                    store[key] = moved[id(tensor)]

    def close(self) -> None:
        while self._before:
            store, key, tensor = self._before.pop()
            store[key] = tensor


def _moved(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    there = tensor.detach().to(device)
    if isinstance(tensor, nn.Parameter):
        return nn.Parameter(there, requires_grad=tensor.requires_grad)
    return there


def move_rest(
    model: nn.Module, places: Mapping[str, list[ParameterRef]], device: Device
) -> MovedTensors:
    """Moves the tensors of `model` that are not streamed to `device`."""
    names = {id(module): name for name, module in model.named_modules()}
    streamed = frozenset(
        f"{names[id(place.module)]}.{place.key}".lstrip(".")
        for where in places.values()
        for place in where
    )
    return MovedTensors(model, torch.device(device.name), streamed)

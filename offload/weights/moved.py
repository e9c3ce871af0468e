"""Tensors that are not streamed (rotary tables, masks, parameters that the model makes
itself), on the device."""

import torch
from torch import nn

from ...io.closing import Closing
from .poison import StreamedParameter


class MovedTensors(Closing):
    """Moves the buffers and parameters of `model` to `device`, except those called in
    `streamed`, and back to what they were when it is closed. A tensor in several
    modules stays one."""

    def __init__(
        self, model: nn.Module, device: torch.device, streamed: frozenset[str]
    ) -> None:
        self._before: list[tuple[dict[str, torch.Tensor | None], str, object]] = []
        moved: dict[int, torch.Tensor] = {}
        for module_name, module in model.named_modules():
            stores: list[dict[str, torch.Tensor | None]] = [
                module._buffers,
                module._parameters,  # type: ignore[list-item]
            ]
            for store in stores:
                for key, tensor in store.items():
                    name = f"{module_name}.{key}" if module_name else key
                    is_there = tensor is None or tensor.device == device
                    if is_there or name in streamed or _has_no_values(tensor):
                        continue
                    self._before.append((store, key, tensor))
                    if id(tensor) not in moved:
                        moved[id(tensor)] = _moved(tensor, device)
                    store[key] = moved[id(tensor)]

    def close(self) -> None:
        while self._before:
            store, key, tensor = self._before.pop()
            store[key] = tensor


def _has_no_values(tensor: torch.Tensor | None) -> bool:
    return isinstance(tensor, StreamedParameter)


def _moved(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    there = tensor.detach().to(device)
    if isinstance(tensor, nn.Parameter):
        return nn.Parameter(there, requires_grad=tensor.requires_grad)
    return there

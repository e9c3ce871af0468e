"""Buffers that no file holds (rotary tables, masks), on the device."""

import torch
from torch import nn

from ...io.closing import Closing


class MovedBuffers(Closing):
    """Moves the buffers of `model` to `device`, except those called in `streamed`, and
    back to what they were when it is closed. A buffer in several modules stays one."""

    def __init__(
        self, model: nn.Module, device: torch.device, streamed: frozenset[str]
    ) -> None:
        self._before: list[tuple[nn.Module, str, torch.Tensor]] = []
        moved: dict[int, torch.Tensor] = {}
        for module_name, module in model.named_modules():
            for key, buffer in module._buffers.items():
                name = f"{module_name}.{key}" if module_name else key
                if buffer is None or name in streamed or buffer.device == device:
                    continue
                self._before.append((module, key, buffer))
                there = moved.get(id(buffer))
                if there is None:
                    there = moved[id(buffer)] = buffer.to(device)
                module._buffers[key] = there

    def close(self) -> None:
        while self._before:
            module, key, buffer = self._before.pop()
            module._buffers[key] = buffer

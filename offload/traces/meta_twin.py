"""Makes a copy of a model's modules whose weights are on meta, to run it without any.

The copy has no hooks and no replaced forwards. Weights that are streamed, and modules
of a running model, can so be traced without touching them.
"""

from collections import OrderedDict
from typing import Any

import torch
from torch import nn

_SMALL = 1 << 20
"""Buffers of up to this many elements (rotary tables) keep their values."""


def meta_twin(model: nn.Module) -> Any:
    """The twin of `model`, in eval mode, with the same names of modules.

    Parameters are on meta; small buffers on the CPU are copied, others are on meta.
    Everything else is shared.
    """
    return _Twins().twin(model)


class _Twins:
    def __init__(self) -> None:
        self._modules: dict[int, nn.Module] = {}
        self._tensors: dict[int, torch.Tensor] = {}

    def twin(self, module: nn.Module) -> nn.Module:
        """The twin of `module`; shared modules have one."""
        known = self._modules.get(id(module))
        if known is not None:
            return known
        kind = type(module)
        made: nn.Module = kind.__new__(kind)
        self._modules[id(module)] = made
        values = dict(vars(module))
        values.pop("forward", None)
        for key in values:
            if key.startswith("_") and "hooks" in key:
                values[key] = OrderedDict()
        values["training"] = False
        values["_parameters"] = {
            key: None if p is None else self._parameter(p)
            for key, p in module._parameters.items()
        }
        values["_buffers"] = {
            key: None if b is None else self._buffer(b)
            for key, b in module._buffers.items()
        }
        made.__dict__.update(values)
        made.__dict__["_modules"] = {
            key: None if child is None else self.twin(child)
            for key, child in module._modules.items()
        }
        return made

    def _parameter(self, given: torch.Tensor) -> torch.Tensor:
        if id(given) not in self._tensors:
            empty = _empty(given)
            self._tensors[id(given)] = nn.Parameter(empty, requires_grad=False)
        return self._tensors[id(given)]

    def _buffer(self, given: torch.Tensor) -> torch.Tensor:
        is_here = type(given) is torch.Tensor and given.device.type == "cpu"
        if is_here and given.numel() <= _SMALL:
            return given.clone()
        return _empty(given)


def _empty(given: torch.Tensor) -> torch.Tensor:
    return torch.empty(tuple(given.shape), dtype=given.dtype, device="meta")

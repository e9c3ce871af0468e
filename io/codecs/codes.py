"""Small codes that stand for numbers."""

import functools
from enum import Enum

import torch

_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_OF_HALVES = {
    "int4": tuple(float(code - 8) for code in range(16)),
    "float4_e2m1": _E2M1 + tuple(-number for number in _E2M1),
}
"""What each code of 4 bits means."""


class Codes(Enum):
    """Kinds of codes: one in a byte, or two, the first of them in its lower half."""

    INT8 = "int8"
    FLOAT8_E4M3 = "float8_e4m3fn"
    FLOAT8_E5M2 = "float8_e5m2"
    INT4 = "int4"
    """Each is stored plus 8."""
    FLOAT4_E2M1 = "float4_e2m1"

    @property
    def per_byte(self) -> int:
        """How many are in a byte."""
        return 2 if self.value in _OF_HALVES else 1

    @property
    def table(self) -> torch.Tensor:
        """The numbers that each byte means: float32, [256, per_byte], on the CPU."""
        return _table(self.value)

    @property
    def numbers(self) -> torch.Tensor:
        """The numbers that the codes mean: float32, of one dimension, on the CPU."""
        return _numbers(self.value)


@functools.cache
def _table(name: str) -> torch.Tensor:
    codes = torch.arange(256, device="cpu")
    if name in _OF_HALVES:
        numbers = torch.tensor(_OF_HALVES[name], dtype=torch.float32, device="cpu")
        return torch.stack((numbers[codes % 16], numbers[codes // 16]), -1)
    kind: torch.dtype = getattr(torch, name)
    return codes.to(torch.uint8).view(kind).to(torch.float32)[:, None]


@functools.cache
def _numbers(name: str) -> torch.Tensor:
    table = _table(name)
    return table[: 16 if table.shape[1] == 2 else 256, 0].contiguous()

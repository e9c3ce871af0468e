"""All dtypes of the safetensors format, with their width and torch dtype."""

from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True)
class StoredDtype:
    """A dtype of the format. `torch` is None if torch has no such dtype."""

    bits: int
    torch: torch.dtype | None
    packed: int = 1
    """Stored elements in one torch element: two 4-bit floats share a byte."""


# Source: the safetensors format's `Dtype` (0.8) and its torch binding.
STORED_DTYPES: dict[str, StoredDtype] = {
    "BOOL": StoredDtype(8, torch.bool),
    "U8": StoredDtype(8, torch.uint8),
    "I8": StoredDtype(8, torch.int8),
    "U16": StoredDtype(16, torch.uint16),
    "I16": StoredDtype(16, torch.int16),
    "U32": StoredDtype(32, torch.uint32),
    "I32": StoredDtype(32, torch.int32),
    "U64": StoredDtype(64, torch.uint64),
    "I64": StoredDtype(64, torch.int64),
    "F4": StoredDtype(4, torch.float4_e2m1fn_x2, packed=2),
    "F6_E2M3": StoredDtype(6, None),
    "F6_E3M2": StoredDtype(6, None),
    "F8_E4M3": StoredDtype(8, torch.float8_e4m3fn),
    "F8_E5M2": StoredDtype(8, torch.float8_e5m2),
    "F8_E8M0": StoredDtype(8, torch.float8_e8m0fnu),
    "F8_E4M3FNUZ": StoredDtype(8, torch.float8_e4m3fnuz),
    "F8_E5M2FNUZ": StoredDtype(8, torch.float8_e5m2fnuz),
    "F16": StoredDtype(16, torch.float16),
    "BF16": StoredDtype(16, torch.bfloat16),
    "F32": StoredDtype(32, torch.float32),
    "F64": StoredDtype(64, torch.float64),
    "C64": StoredDtype(64, torch.complex64),
}


def itemsize(dtype: torch.dtype) -> int:
    """Bytes of one element of `dtype`."""
    return dtype.itemsize

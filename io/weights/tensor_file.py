"""Writes a safetensors file in which each tensor has a chosen offset modulo 64."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from ..checkpoint.dtypes import STORED_DTYPES
from .layout import TENSOR_ALIGNMENT

FILLER = "penstock.filler."
"""Prefix of the names of padding tensors: the format allows no gaps between tensors."""

_STORED = {stored.torch: (name, stored) for name, stored in STORED_DTYPES.items()}


def write_tensors(
    path: Path, tensors: Mapping[str, torch.Tensor], residues: Mapping[str, int]
) -> None:
    """Writes `tensors` to `path`, in their order.

    Tensors may have any shape, lie on any device, and have any dtype of the format. The
    offset of each in the file is `residues[name]` bytes modulo 64.

    Raises OSError if the file cannot be written, and ValueError for a dtype that the
    format does not have.
    """
    header: dict[str, Any] = {}
    fillers: dict[str, int] = {}
    position = 0  # from the start of the data, which is a multiple of 64
    for name, tensor in tensors.items():
        fillers[name] = (residues[name] - position) % TENSOR_ALIGNMENT
        if fillers[name]:
            end = position + fillers[name]
            header[f"{FILLER}{len(header)}"] = {
                "dtype": "U8",
                "shape": [fillers[name]],
                "data_offsets": [position, end],
            }
            position = end
        end = position + tensor.nbytes
        header[name] = {**_described(name, tensor), "data_offsets": [position, end]}
        position = end
    text = json.dumps(header).encode()
    text += b" " * (-(8 + len(text)) % TENSOR_ALIGNMENT)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name, tensor in tensors.items():
            file.write(bytes(fillers[name]))
            if tensor.numel():
                content = tensor.detach().cpu().contiguous().reshape(-1)
                file.write(content.view(torch.uint8).numpy().data)


def _described(name: str, tensor: torch.Tensor) -> dict[str, Any]:
    if tensor.dtype not in _STORED:
        raise ValueError(f"safetensors has no {tensor.dtype}, which {name!r} is of")
    dtype, stored = _STORED[tensor.dtype]
    shape = list(tensor.shape)
    if stored.packed > 1:
        shape[-1] *= stored.packed
    return {"dtype": dtype, "shape": shape}

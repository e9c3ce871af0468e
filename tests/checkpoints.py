"""Writes checkpoints for tests: random bits, several shards, and headers that lie."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from penstock.io.checkpoint.index import INDEX_FILE, SINGLE_FILE

SAVED_DTYPES: dict[str, torch.dtype] = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "U16": torch.uint16,
    "I16": torch.int16,
    "U32": torch.uint32,
    "I32": torch.int32,
    "U64": torch.uint64,
    "I64": torch.int64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
    "C64": torch.complex64,
}
"""Dtypes that safetensors.torch saves one element for one; F4 is packed."""


def random_tensor(
    dtype: torch.dtype, shape: Sequence[int], *, seed: int = 0
) -> torch.Tensor:
    """A tensor of random bits: subnormals, infinities and NaNs are among them."""
    generator = torch.Generator().manual_seed(seed)
    numel = torch.Size(shape).numel()
    nbytes = numel * dtype.itemsize
    bits = torch.randint(256, (nbytes,), dtype=torch.uint8, generator=generator)
    if dtype is torch.bool:
        return (bits % 2).view(torch.bool).reshape(tuple(shape))
    return bits.view(dtype).reshape(tuple(shape))


def random_floats(
    dtype: torch.dtype, shape: Sequence[int], *, seed: int = 0
) -> torch.Tensor:
    """Random numbers, in `dtype`: what a cast rounds the same way everywhere."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(tuple(shape), generator=generator).to(dtype)


def same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether dtype, shape and every bit are equal (NaNs and signed zeros included)."""
    return (
        one.dtype == other.dtype
        and one.shape == other.shape
        and torch.equal(bits_of(one), bits_of(other))
    )


def bits_of(tensor: torch.Tensor) -> torch.Tensor:
    """The bytes of `tensor`, in order."""
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8)


def write_checkpoint(
    folder: Path, tensors: Mapping[str, torch.Tensor], *, num_shards: int = 1
) -> Path:
    """Writes `tensors` to `folder`: one file, or shards dealt in turn and their index.
    Returns the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    if num_shards == 1:
        save_file(dict(tensors), folder / SINGLE_FILE)
        return folder
    shards: list[dict[str, torch.Tensor]] = [{} for _ in range(num_shards)]
    weight_map: dict[str, str] = {}
    for index, (name, tensor) in enumerate(tensors.items()):
        shards[index % num_shards][name] = tensor
        weight_map[name] = shard_name(index % num_shards, num_shards)
    for index, shard in enumerate(shards):
        save_file(shard, folder / shard_name(index, num_shards))
    write_index(folder, weight_map)
    return folder


def shard_name(index: int, num_shards: int) -> str:
    """The name that transformers gives shard `index` (from 0)."""
    return f"model-{index + 1:05}-of-{num_shards:05}.safetensors"


def write_index(folder: Path, weight_map: Any) -> Path:
    """Writes an index with any `weight_map`, true or not. Returns its path."""
    path = folder / INDEX_FILE
    path.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return path


def entry(dtype: Any, shape: Any, start: Any, end: Any) -> dict[str, Any]:
    """One tensor of a header, sound or not."""
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


def write_raw(
    path: Path, header: Mapping[str, Any] | bytes, *, data: bytes = b""
) -> Path:
    """Writes a safetensors file with just this header and data. Returns its path."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    return path


def shift_tensors(folder: Path, offset: int) -> None:
    """Makes the tensors of each safetensors file in `folder` start at `offset` modulo
    64 (a multiple of 8), by spaces at the end of the header, which the format allows.
    """
    for path in folder.glob("*.safetensors"):
        content = path.read_bytes()
        nbytes = int.from_bytes(content[:8], "little")
        header, data = content[8 : 8 + nbytes], content[8 + nbytes :]
        header = header.rstrip()
        header += b" " * ((offset - 8 - len(header)) % 64)
        path.write_bytes(len(header).to_bytes(8, "little") + header + data)

"""Reads a safetensors header strictly: a header that lies is an error, never a weight.

Format: 8 bytes of little-endian header length, a JSON object, then the tensors' bytes.
"""

import json
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from .dtypes import STORED_DTYPES
from .errors import CheckpointError

# The safetensors library refuses longer headers; so do we, before allocating.
MAX_HEADER_BYTES = 100_000_000


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """One tensor as it lies in one file."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    """In torch elements (a packed 4-bit dtype counts two values as one)."""
    path: Path
    offset: int
    """Bytes from the start of the file."""
    nbytes: int


@dataclass(frozen=True, slots=True)
class FileStamp:
    """What must not change while a file is being streamed."""

    size_bytes: int
    mtime_ns: int

    @classmethod
    def of(cls, stat: os.stat_result) -> "FileStamp":
        return cls(stat.st_size, stat.st_mtime_ns)


def read_header(path: Path) -> tuple[FileStamp, tuple[TensorEntry, ...]]:
    """Parses the header of `path`; entries come in file order.

    Raises CheckpointError naming the file and what is wrong with it.
    """
    try:
        with path.open("rb") as file:
            stamp = FileStamp.of(os.fstat(file.fileno()))
            prefix = file.read(8)
            if len(prefix) < 8:
                raise CheckpointError(
                    f"{path} is {stamp.size_bytes} bytes long: too short to be a "
                    "safetensors file; download or save it again"
                )
            length = int.from_bytes(prefix, "little")
            if length > min(MAX_HEADER_BYTES, stamp.size_bytes - 8):
                raise CheckpointError(
                    f"{path} says its header has {length} bytes, but the file has "
                    f"{stamp.size_bytes}: truncated or not a safetensors file"
                )
            text = file.read(length)
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror}") from error
    try:
        header = json.loads(text)
    except ValueError as error:
        raise CheckpointError(f"{path} has a header that is no JSON: {error}") from None
    if not isinstance(header, dict):
        raise CheckpointError(f"{path} has a header that is no JSON object")
    header.pop("__metadata__", None)
    entries = sorted(
        (_entry(path, 8 + length, name, value) for name, value in header.items()),
        key=lambda entry: (entry.offset, entry.nbytes),
    )
    _check_coverage(path, stamp.size_bytes, 8 + length, entries)
    return stamp, tuple(entries)


def _entry(path: Path, data_start: int, name: str, value: Any) -> TensorEntry:
    where = f"{path}, tensor {name!r}"
    try:
        dtype_name, shape = value["dtype"], tuple(value["shape"])
        start, end = value["data_offsets"]
        sound = all(
            isinstance(x, int) and not isinstance(x, bool) and x >= 0
            for x in (*shape, start, end)
        )
    except (KeyError, TypeError, ValueError):
        sound = False
    if not sound:
        raise CheckpointError(f"{where}: malformed header entry {value!r}")
    if dtype_name not in STORED_DTYPES:
        known = ", ".join(STORED_DTYPES)
        raise CheckpointError(f"{where}: unknown dtype {dtype_name!r}; known: {known}")
    stored = STORED_DTYPES[dtype_name]
    if stored.torch is None:
        raise CheckpointError(f"{where}: torch has no dtype for {dtype_name}")
    bits = math.prod(shape) * stored.bits
    if end - start != bits // 8 or bits % 8:
        raise CheckpointError(
            f"{where}: {dtype_name} {list(shape)} takes {bits / 8:g} bytes, "
            f"but its offsets {start}..{end} hold {end - start}"
        )
    if stored.packed > 1:
        if not shape or shape[-1] % stored.packed:
            raise CheckpointError(f"{where}: {dtype_name} needs an even last dimension")
        shape = (*shape[:-1], shape[-1] // stored.packed)
    return TensorEntry(name, stored.torch, shape, path, data_start + start, end - start)


def _check_coverage(
    path: Path, size_bytes: int, data_start: int, entries: list[TensorEntry]
) -> None:
    """Tensors must fill the file from header to end without overlap, as the format
    demands: a gap or an overlap means that some offset is a lie."""
    position = data_start
    for entry in entries:
        if entry.offset < position:
            raise CheckpointError(
                f"{path}, tensor {entry.name!r} overlaps the tensor before it"
            )
        if entry.offset > position:
            raise CheckpointError(
                f"{path}: {entry.offset - position} bytes before tensor "
                f"{entry.name!r} belong to no tensor"
            )
        position = entry.offset + entry.nbytes
    if position > size_bytes:
        raise CheckpointError(
            f"{path} is truncated: its header promises {position} bytes, the file has "
            f"{size_bytes}; download or copy it again"
        )
    if position < size_bytes:
        raise CheckpointError(
            f"{path} has {size_bytes - position} bytes after its last tensor"
        )

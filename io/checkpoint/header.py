"""Reads a safetensors header strictly: a wrong header is an error, never a weight.

Format: 8 bytes of little-endian header length, a JSON object, then the tensors' bytes.
"""

import json
import math
import os
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from ..errors import CheckpointError
from ..extent import Extent
from ..regular_file import open_regular
from .dtypes import STORED_DTYPES

# The safetensors library refuses longer headers; so do we, before allocating.
MAX_HEADER_BYTES = 100_000_000
_MAX_DIMENSIONS = 64  # torch's own limit
_MAX_NUMBER = 1 << 63
_NAMES = re.compile(rb'"[ \t\r\n]*:')


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """One tensor stored in a file."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    """In torch elements: a packed 4-bit dtype counts two values as one."""
    path: Path
    offset: int
    """Bytes from the start of the file."""
    nbytes: int

    @property
    def extent(self) -> Extent:
        """The byte range of the file that holds it."""
        return Extent(self.path, self.offset, self.nbytes)


@dataclass(frozen=True, slots=True)
class FileStamp:
    """The properties of a file that must not change while it is being streamed.

    A program that writes to a file can restore its mtime, but not its ctime.
    """

    size_bytes: int
    mtime_ns: int
    inode: int = 0
    ctime_ns: int = 0
    num_links: int = 1

    @classmethod
    def of(cls, stat: os.stat_result) -> "FileStamp":
        """The stamp of a file with the status `stat`."""
        size, mtime = stat.st_size, stat.st_mtime_ns
        return cls(size, mtime, stat.st_ino, stat.st_ctime_ns, stat.st_nlink)

    def is_of(self, stat: os.stat_result) -> bool:
        """Whether the file with the status `stat` is unchanged.

        Adding or removing a hard link changes the ctime but not the content, so it does
        not count as a change.
        """
        now = FileStamp.of(stat)
        if now.num_links != self.num_links:
            now = replace(now, num_links=self.num_links, ctime_ns=self.ctime_ns)
        return now == self


@dataclass(frozen=True, slots=True)
class HeaderText:
    """The header of one file, not parsed yet."""

    path: Path
    stamp: FileStamp
    text: bytes

    @property
    def data_start(self) -> int:
        """Where the tensors begin, in bytes from the start of the file."""
        return 8 + len(self.text)


def read_header(path: Path) -> tuple[FileStamp, tuple[TensorEntry, ...]]:
    """Parses the header of `path`. Entries are in the order of their offsets.

    Raises CheckpointError naming the file, what is wrong with it, and what to do.
    """
    header = read_text(path)
    return header.stamp, parse(header)


def read_text(path: Path) -> HeaderText:
    """Reads the header of `path`. Raises CheckpointError if it has none."""
    try:
        with open_regular(path) as file:
            stamp = FileStamp.of(os.fstat(file.fileno()))
            prefix = file.read(8)
            length = int.from_bytes(prefix, "little")
            if prefix == b"version ":
                raise CheckpointError(
                    f"{path} is a pointer of Git LFS, not the file: run `git lfs pull`"
                )
            if len(prefix) < 8:
                raise _broken(path, f"is too short: {stamp.size_bytes} bytes")
            if length > min(MAX_HEADER_BYTES, stamp.size_bytes - 8):
                raise _broken(
                    path,
                    f"says that its header has {length} bytes, but the file has "
                    f"{stamp.size_bytes}: it is truncated or no safetensors file",
                )
            return HeaderText(path, stamp, file.read(length))
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror}") from error


def parse(header: HeaderText) -> tuple[TensorEntry, ...]:
    """The tensors of a file, in the order of their offsets. Raises CheckpointError."""
    path, start = header.path, header.data_start
    try:
        values = _values(header.text)
    except (ValueError, RecursionError) as error:
        raise _broken(path, f"has a header that is not valid JSON ({error})") from None
    if not isinstance(values, dict):
        raise _broken(path, "has a header that is not a JSON object")
    values.pop("__metadata__", None)
    return checked(
        path,
        header.stamp.size_bytes,
        start,
        [_entry(path, start, name, value) for name, value in values.items()],
    )


def checked(
    path: Path, size_bytes: int, data_start: int, entries: list[TensorEntry]
) -> tuple[TensorEntry, ...]:
    """`entries` in the order of their offsets. Raises CheckpointError unless they fill
    the file."""
    entries.sort(key=lambda entry: (entry.offset, entry.nbytes))
    _check_coverage(path, size_bytes, data_start, entries)
    return tuple(entries)


def _broken(path: Path, what: str) -> CheckpointError:
    return CheckpointError(f"{path} {what}; download, copy or save it again")


def _values(text: bytes) -> Any:
    """The value of the JSON `text`. Raises ValueError if a name occurs twice, of which
    Python's parser keeps only the last one."""
    if b"\\" not in text:  # so each quote begins or ends a string
        values = json.loads(text)
        if _num_names(values) == len(_NAMES.findall(text)):
            return values
    return json.loads(text, object_pairs_hook=_unique)  # several times slower


def _num_names(values: Any) -> int:
    """The names in an object and in the objects that are its values."""
    if not isinstance(values, dict):
        return -1
    inner = (len(value) for value in values.values() if isinstance(value, dict))
    return len(values) + sum(inner)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Refuses a name that occurs twice: Python's parser would keep only the last one.

    Raises ValueError.
    """
    values: dict[str, Any] = {}
    for name, value in pairs:
        if name in values:
            raise ValueError(f"{name!r} stands in it twice")
        values[name] = value
    return values


def _entry(path: Path, data_start: int, name: str, value: Any) -> TensorEntry:
    if not _is_sound(value):
        raise _broken(path, f"has a malformed entry of tensor {name!r}: {value!r:.200}")
    shape: tuple[int, ...] = tuple(value["shape"])
    start, end = value["data_offsets"]
    dtype_name = value["dtype"]
    stored = STORED_DTYPES.get(dtype_name)
    if stored is None or stored.torch is None:
        known = ", ".join(key for key, kind in STORED_DTYPES.items() if kind.torch)
        raise CheckpointError(
            f"{path}, tensor {name!r}: torch has no dtype {dtype_name}; save the "
            f"checkpoint again in one of {known}"
        )
    bits = math.prod(shape) * stored.bits
    if end - start != bits // 8 or bits % 8:
        raise _broken(
            path,
            f"contradicts itself: tensor {name!r}, {dtype_name} {list(shape)}, takes "
            f"{bits / 8:g} bytes, but its offsets {start}..{end} hold {end - start}",
        )
    if stored.packed > 1:
        if not shape or shape[-1] % stored.packed:
            raise _broken(path, f"has tensor {name!r} in {dtype_name} with an odd row")
        shape = (*shape[:-1], shape[-1] // stored.packed)
    return TensorEntry(name, stored.torch, shape, path, data_start + start, end - start)


def _is_sound(value: Any) -> bool:
    """Whether a header entry has the types that the format requires."""
    if not isinstance(value, dict) or not isinstance(value.get("dtype"), str):
        return False
    shape, offsets = value.get("shape"), value.get("data_offsets")
    if not isinstance(shape, list) or not isinstance(offsets, list):
        return False
    if len(offsets) != 2 or len(shape) > _MAX_DIMENSIONS:
        return False
    for number in (*shape, *offsets):  # `all` takes twice as long
        if type(number) is not int or not 0 <= number < _MAX_NUMBER:
            return False
    return True


def _check_coverage(
    path: Path, size_bytes: int, data_start: int, entries: list[TensorEntry]
) -> None:
    """Checks that tensors fill the file from the header to its end, without overlap.

    The format requires this: a gap or an overlap means that some offset is wrong.
    Raises CheckpointError.
    """
    position = data_start
    for entry in entries:
        if entry.offset < position:
            raise _broken(path, f"has tensor {entry.name!r} overlap the one before it")
        if entry.offset > position:
            raise _broken(
                path,
                f"has {entry.offset - position} bytes before tensor {entry.name!r} "
                "that belong to no tensor",
            )
        position = entry.offset + entry.nbytes
    if position > size_bytes:
        raise _broken(
            path,
            f"is truncated: its header promises {position} bytes, the file has "
            f"{size_bytes}",
        )
    if position < size_bytes:
        raise _broken(path, f"has {size_bytes - position} bytes after its last tensor")

"""Keeps what the headers of large checkpoints say between runs, so that the next start
need not read and parse thousands of tensors again.

A cache belongs to one folder of a checkpoint. What it says of a file counts only as
long as the file's stamp is the same, and is checked as a header is. A cache that is
damaged, of another version, or cannot be written has no effect.
"""

import contextlib
import hashlib
import json
import math
import os
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ..errors import CheckpointError
from ..regular_file import read_whole
from .dtypes import STORED_DTYPES
from .header import MAX_HEADER_BYTES, FileStamp, TensorEntry, checked

MIN_TENSORS = 2000
"""A checkpoint with fewer is opened as fast without a cache."""
MAX_CACHES = 16
"""Caches in a folder; of more, those that are the longest without use are removed."""
_VERSION = "penstock headers 1"
_DTYPES = {name: kind.torch for name, kind in STORED_DTYPES.items() if kind.torch}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}

Header = tuple[FileStamp, tuple[TensorEntry, ...]]


class HeaderCache:
    """The headers of the files in one folder, kept in a file in the folder `caches`."""

    def __init__(self, caches: Path, folder: Path) -> None:
        name = hashlib.sha256(os.fsencode(folder.resolve())).hexdigest()
        self._path = caches / f"{name[:32]}.json"

    def get(self, paths: Iterable[Path]) -> dict[Path, Header]:
        """The headers of those files whose stamps have not changed."""
        known = self._read()
        found: dict[Path, Header] = {}
        for path in paths if known else ():
            with contextlib.suppress(
                OSError, CheckpointError, KeyError, TypeError, ValueError
            ):
                kept = known[path.name]
                status = path.stat()
                if FileStamp(*map(int, kept["stamp"])).is_of(status):
                    stamp = FileStamp.of(status)
                    found[path] = stamp, _entries(path, stamp, kept)
        if found:
            with contextlib.suppress(OSError):
                os.utime(self._path)
        return found

    def put(self, headers: Mapping[Path, Header]) -> None:
        """Keeps `headers`, all of the folder, if they are many and this is possible."""
        if sum(len(entries) for _, entries in headers.values()) < MIN_TENSORS:
            return
        content = json.dumps(
            {path.name: _kept(*header) for path, header in headers.items()},
            separators=(",", ":"),
        ).encode()
        with contextlib.suppress(OSError):
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=self._path.parent) as made_in:
                made = Path(made_in) / self._path.name
                made.write_bytes(_seal(content) + content)
                made.replace(self._path)
            self._remove_others()

    def _read(self) -> dict[str, Any]:
        """What the cache says, by the names of files; nothing if it is not sound."""
        try:
            seal, _, content = read_whole(self._path, MAX_HEADER_BYTES).partition(b"\n")
            if seal + b"\n" != _seal(content):
                return {}
            found = json.loads(content)
        except (CheckpointError, ValueError, RecursionError):
            return {}
        return found if isinstance(found, dict) else {}

    def _remove_others(self) -> None:
        caches = sorted(
            self._path.parent.glob("*.json"), key=lambda path: path.stat().st_mtime
        )
        for path in caches[:-MAX_CACHES]:
            path.unlink()


def _seal(content: bytes) -> bytes:
    """The first line of a cache, by which damage is noticed."""
    return f"{_VERSION} {hashlib.sha256(content).hexdigest()}\n".encode()


def _kept(stamp: FileStamp, entries: tuple[TensorEntry, ...]) -> dict[str, Any]:
    """A header as columns. Tensors lie one behind the other, so sizes are enough."""
    return {
        "stamp": [
            stamp.size_bytes,
            stamp.mtime_ns,
            stamp.inode,
            stamp.ctime_ns,
            stamp.num_links,
        ],
        "names": [entry.name for entry in entries],
        "dtypes": [_NAMES[entry.dtype] for entry in entries],
        "shapes": [entry.shape for entry in entries],
    }


def _entries(
    path: Path, stamp: FileStamp, kept: Mapping[str, Any]
) -> tuple[TensorEntry, ...]:
    """The tensors of a file. Raises what is raised for a cache that is not sound."""
    dtypes = [_DTYPES[name] for name in kept["dtypes"]]
    shapes = [tuple(shape) for shape in kept["shapes"]]
    sizes = [
        math.prod(shape) * dtype.itemsize
        for shape, dtype in zip(shapes, dtypes, strict=True)
    ]
    start = offset = stamp.size_bytes - sum(sizes)
    if start < 8:
        raise ValueError("the file is too short")
    found = []
    columns = zip(kept["names"], dtypes, shapes, sizes, strict=True)
    for name, dtype, shape, nbytes in columns:
        found.append(TensorEntry(name, dtype, shape, path, offset, nbytes))
        offset += nbytes
    return checked(path, stamp.size_bytes, start, found)

"""The steps that change the disk, each of which is durable when it returns, and JSON
that holds a checksum of itself."""

import json
import os
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import xxhash

_BUFFER_BYTES = 1 << 20
NEW = ".new"
"""The suffix of a file that is not complete yet."""
_CHECKSUM = "checksum"


class DurableFiles:
    """Writes, renames and removes files.

    Results are written only through it, so that a test can end the process between any
    two steps. Methods raise OSError.
    """

    def make_folder(self, path: Path) -> None:
        """Creates the folder `path` and the folders above it, if they are missing."""
        path.mkdir(parents=True, exist_ok=True)

    def write(self, path: Path, chunks: Iterable[bytes]) -> None:
        """Creates a file of these bytes, which are on the device when this returns."""
        with path.open("wb", buffering=_BUFFER_BYTES) as file:
            for chunk in chunks:
                file.write(chunk)
            file.flush()
            os.fsync(file.fileno())

    def sync(self, path: Path) -> None:
        """Makes a file, or the names in a folder, durable."""
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

    def rename(self, source: Path, target: Path) -> None:
        """Gives `source` the name `target`; there is no moment when `target` is
        missing."""
        os.replace(source, target)

    def remove(self, path: Path) -> None:
        """Removes a file, if it is there."""
        path.unlink(missing_ok=True)

    def remove_folder(self, path: Path) -> None:
        """Removes an empty folder."""
        path.rmdir()


def write_whole(disk: DurableFiles, path: Path, chunks: Iterable[bytes]) -> None:
    """Writes the file `path`. It has either all of these bytes or its previous
    content."""
    new = path.with_name(path.name + NEW)
    try:
        disk.write(new, chunks)
        put_in_place(disk, new, path)
    except Exception:  # such as a full disk: leave nothing behind
        with suppress(OSError):
            disk.remove(new)
        raise


def put_in_place(disk: DurableFiles, new: Path, path: Path) -> None:
    """Gives the file `new`, which is durable, the name `path`, durably."""
    disk.rename(new, path)
    disk.sync(path.parent)


def sealed(values: Mapping[str, Any], *, indent: int | None = None) -> bytes:
    """`values` and their checksum as JSON: one line, or several with `indent`."""
    values = {**values, _CHECKSUM: _checksum(values)}
    return json.dumps(values, indent=indent).encode() + b"\n"


def unsealed(text: bytes) -> dict[str, Any]:
    """The values in `text`. Raises ValueError where they differ from what `sealed` was
    given."""
    try:
        values = json.loads(text)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    if not isinstance(values, dict):
        raise ValueError("it is no JSON object")
    found = values.pop(_CHECKSUM, None)
    if found != _checksum(values):
        raise ValueError("its checksum is another one")
    return values


def _checksum(values: Mapping[str, Any]) -> str:
    text = json.dumps(values, sort_keys=True)
    return xxhash.xxh3_128(text.encode()).hexdigest()

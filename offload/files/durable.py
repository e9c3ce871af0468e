"""What changes the disk, step by step: each is durable when it returns."""

import os
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

_BUFFER_BYTES = 1 << 20
NEW = ".new"
"""Ends the name of a file that is not whole yet."""


class DurableFiles:
    """The only way results come to disk, so that a test can end the process between
    any two steps. Methods raise OSError as the system does."""

    def make_folder(self, path: Path) -> None:
        """`path` and the folders above it, where they are missing."""
        path.mkdir(parents=True, exist_ok=True)

    def write(self, path: Path, chunks: Iterable[bytes]) -> None:
        """A file of these bytes, on the device when this returns."""
        with path.open("wb", buffering=_BUFFER_BYTES) as file:
            for chunk in chunks:
                file.write(chunk)
            file.flush()
            os.fsync(file.fileno())

    def sync(self, path: Path) -> None:
        """Brings a file, or the names in a folder, to the device."""
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

    def rename(self, source: Path, target: Path) -> None:
        """`target` is `source` from now on, or else what it was before."""
        os.replace(source, target)

    def remove(self, path: Path) -> None:
        """Removes a file, if it is there."""
        path.unlink(missing_ok=True)

    def remove_folder(self, path: Path) -> None:
        """Removes an empty folder."""
        path.rmdir()


def write_whole(disk: DurableFiles, path: Path, chunks: Iterable[bytes]) -> None:
    """The file `path` of these bytes: there as a whole, or as it was before."""
    new = path.with_name(path.name + NEW)
    try:
        disk.write(new, chunks)
        put_in_place(disk, new, path)
    except Exception:  # a full disk: at least not filled by this
        with suppress(OSError):
            disk.remove(new)
        raise


def put_in_place(disk: DurableFiles, new: Path, path: Path) -> None:
    """Gives the file `new`, which is on the device, its name `path` for good."""
    disk.rename(new, path)
    disk.sync(path.parent)

"""Reads whole files: only regular ones, up to a given size.

A file in a checkpoint's folder could be a pipe or a device that never ends.
"""

import json
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from .errors import CheckpointError, PenstockError

MAX_CONFIG_BYTES = 16 << 20
"""Most bytes of a JSON file with settings. Real ones have kilobytes."""
MAX_INDEX_BYTES = 100 << 20
"""Most bytes of a list of all tensors, or of all parts of a job."""
DOWNLOAD_AGAIN = "download or copy it again"


@contextmanager
def open_regular(
    path: Path, *, error: type[PenstockError] = CheckpointError
) -> Iterator[BinaryIO]:
    """Opens the file `path` for reading, and never waits for the writer of a pipe.

    Raises `error` if it cannot be opened or is not a regular file.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except (OSError, ValueError) as problem:  # ValueError: a name with a NUL
        why = getattr(problem, "strerror", None) or problem
        raise error(f"cannot read {path}: {why}") from problem
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise error(f"cannot read {path}: it is not a regular file")
    with open(descriptor, "rb") as file:
        yield file


def read_whole(
    path: Path, most_bytes: int, *, error: type[PenstockError] = CheckpointError
) -> bytes:
    """All bytes of the file `path`.

    Raises `error` if it is not a regular file, has more than `most_bytes`, or cannot be
    read.
    """
    with open_regular(path, error=error) as file:
        try:
            content = file.read(most_bytes + 1)
        except OSError as problem:
            raise error(f"cannot read {path}: {problem.strerror}") from problem
    if len(content) > most_bytes:
        raise error(
            f"{path} has more than the {most_bytes:,} bytes that are read of it"
        )
    return content


def read_json(
    path: Path,
    most_bytes: int = MAX_CONFIG_BYTES,
    *,
    error: type[PenstockError] = CheckpointError,
    fix: str = DOWNLOAD_AGAIN,
) -> Any:
    """The value in the JSON file `path`.

    Raises `error` as `read_whole` does, and if the file is not JSON or nested too
    deeply. `fix` tells the user what to do then.
    """
    content = read_whole(path, most_bytes, error=error)
    try:
        return json.loads(content)
    except RecursionError:
        raise error(f"{path} is not valid JSON: it is too deep; {fix}") from None
    except ValueError as problem:  # UnicodeDecodeError is one
        raise error(f"{path} is not valid JSON: {problem}; {fix}") from None


def read_json_object(
    path: Path,
    most_bytes: int = MAX_CONFIG_BYTES,
    *,
    error: type[PenstockError] = CheckpointError,
    fix: str = DOWNLOAD_AGAIN,
) -> dict[str, Any]:
    """Like `read_json`, but raises `error` if the value is not an object."""
    values = read_json(path, most_bytes, error=error, fix=fix)
    if not isinstance(values, dict):
        raise error(f"{path} must hold an object, not {values!r:.40}; {fix}")
    return values

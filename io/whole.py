"""Files that are read whole: regular ones, up to a stated size. What comes with a
checkpoint may be a pipe that never ends, or a device that gives zeros for ever."""

import json
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from .errors import CheckpointError, PenstockError

MAX_CONFIG_BYTES = 16 << 20
"""Of a JSON file with settings: real ones have kilobytes."""
MAX_INDEX_BYTES = 100 << 20
"""Of a list of all tensors, or of all parts of a job."""
DOWNLOAD_AGAIN = "download or copy it again"


@contextmanager
def open_regular(
    path: Path, *, error: type[PenstockError] = CheckpointError
) -> Iterator[BinaryIO]:
    """The file `path`, opened for reading; never waits for anybody at the other end of
    a pipe. Raises `error` for what cannot be opened, or is no regular file."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except (OSError, ValueError) as problem:  # ValueError: a name with a NUL
        why = getattr(problem, "strerror", None) or problem
        raise error(f"cannot read {path}: {why}") from problem
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise error(f"cannot read {path}: it is no regular file")
    with open(descriptor, "rb") as file:
        yield file


def read_whole(
    path: Path, most_bytes: int, *, error: type[PenstockError] = CheckpointError
) -> bytes:
    """All bytes of the file `path`. Raises `error` for what is no regular file, has
    more than `most_bytes` or cannot be read."""
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
    """What the JSON file `path` holds. Raises `error` as `read_whole` does, and where
    it is no JSON or too deep: `fix` says what to do then."""
    content = read_whole(path, most_bytes, error=error)
    try:
        return json.loads(content)
    except RecursionError:
        raise error(f"{path} is no JSON: it is too deep; {fix}") from None
    except ValueError as problem:  # UnicodeDecodeError is one
        raise error(f"{path} is no JSON: {problem}; {fix}") from None


def read_json_object(
    path: Path,
    most_bytes: int = MAX_CONFIG_BYTES,
    *,
    error: type[PenstockError] = CheckpointError,
    fix: str = DOWNLOAD_AGAIN,
) -> dict[str, Any]:
    """As `read_json`, where the file must hold an object."""
    values = read_json(path, most_bytes, error=error, fix=fix)
    if not isinstance(values, dict):
        raise error(f"{path} must hold an object, not {values!r:.40}; {fix}")
    return values

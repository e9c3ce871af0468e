"""A folder for weights that Penstock writes, for as long as a process needs them."""

import contextlib
import fcntl
import shutil
import tempfile
import weakref
from pathlib import Path
from typing import TextIO

from ...io.errors import OutputError
from ...io.fork_guard import ForkGuard

_LOCK = "in-use"


class SpillFolder:
    """A folder in `cache` whose name begins with `prefix`.

    It is removed by `cleanup`, when this object is garbage collected, or at exit of the
    process that made it, but not of its forks. It is locked meanwhile. So the folders
    of killed processes can be told apart and are removed. Raises OutputError if it
    cannot be made.
    """

    def __init__(self, cache: Path, prefix: str) -> None:
        try:
            cache.mkdir(parents=True, exist_ok=True)
            _remove_abandoned(cache, prefix)
            self.path, lock = _make(cache, prefix)
        except OSError as error:
            raise OutputError(
                f"cannot make a folder in {cache} ({error.strerror}); set io.cache to "
                "a folder that can be written"
            ) from error
        self._finaliser = weakref.finalize(self, _remove, self.path, lock, ForkGuard())

    def cleanup(self) -> None:
        """Removes the folder; may be called again."""
        self._finaliser()


def _make(cache: Path, prefix: str) -> tuple[Path, TextIO]:
    """Makes a new folder, and holds its lock.

    Until it is locked, another process may take the folder for an abandoned one and
    remove it. Then another folder is made.
    """
    while True:
        path = Path(tempfile.mkdtemp(prefix=prefix, dir=cache)).absolute()
        try:
            lock = (path / _LOCK).open("w")
        except FileNotFoundError:
            continue
        try:
            fcntl.flock(lock, fcntl.LOCK_EX)
        except OSError:
            _remove(path, lock, ForkGuard())
            raise
        if (path / _LOCK).exists():
            return path, lock
        lock.close()


def _remove(path: Path, lock: TextIO, fork_guard: ForkGuard) -> None:
    if not fork_guard.is_forked:
        shutil.rmtree(path, ignore_errors=True)
    lock.close()


def _remove_abandoned(cache: Path, prefix: str) -> None:
    for path in cache.glob(f"{prefix}*"):
        with contextlib.suppress(OSError), (path / _LOCK).open("r+") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(path)

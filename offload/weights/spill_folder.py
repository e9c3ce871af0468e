"""A folder of weights that are Penstock's own, for as long as a process needs them."""

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
    """A folder in `cache`, its name beginning with `prefix`, that is removed when it is
    cleaned up or dropped, or at exit of the process that made it (not of one that was
    forked). It is locked meanwhile: what killed processes have left is known by that,
    and removed."""

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
        """Removes it. Nothing if that has been done."""
        self._finaliser()


def _make(cache: Path, prefix: str) -> tuple[Path, TextIO]:
    """A new folder, and its lock, which is held. Until it is, another process may take
    the folder for one that was left, and remove it: then there is another try."""
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

"""A folder of weights that are Penstock's own, for as long as a process needs them."""

import contextlib
import fcntl
import shutil
import tempfile
import weakref
from pathlib import Path
from typing import TextIO

from ...io.errors import OutputError
from ...io.home import Home

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
            self.path = Path(tempfile.mkdtemp(prefix=prefix, dir=cache)).absolute()
            lock = (self.path / _LOCK).open("w")
            self._finaliser = weakref.finalize(self, _remove, self.path, lock, Home())
            fcntl.flock(lock, fcntl.LOCK_EX)
        except OSError as error:
            raise OutputError(
                f"cannot make a folder in {cache} ({error.strerror}); set io.cache to "
                "a folder that can be written"
            ) from error

    def cleanup(self) -> None:
        """Removes it. Nothing if that has been done."""
        self._finaliser()


def _remove(path: Path, lock: TextIO, home: Home) -> None:
    if home.is_here:
        shutil.rmtree(path, ignore_errors=True)
    lock.close()


def _remove_abandoned(cache: Path, prefix: str) -> None:
    for path in cache.glob(f"{prefix}*"):
        with contextlib.suppress(OSError), (path / _LOCK).open("r+") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(path)

"""A folder of weights that are Penstock's own, for as long as a process needs them."""

import contextlib
import fcntl
import shutil
import tempfile
from pathlib import Path

from ...io.errors import OutputError

_LOCK = "in-use"


class SpillFolder:
    """A folder in `cache`, its name beginning with `prefix`, that is removed when it is
    cleaned up, or at exit. It is locked meanwhile: what killed processes have left is
    known by that, and removed."""

    def __init__(self, cache: Path, prefix: str) -> None:
        try:
            cache.mkdir(parents=True, exist_ok=True)
            _remove_abandoned(cache, prefix)
            self._folder = tempfile.TemporaryDirectory(prefix=prefix, dir=cache)
            self.path = Path(self._folder.name)
            self._lock = (self.path / _LOCK).open("w")
            fcntl.flock(self._lock, fcntl.LOCK_EX)
        except OSError as error:
            raise OutputError(
                f"cannot make a folder in {cache} ({error.strerror}); set io.cache to "
                "a folder that can be written"
            ) from error

    def cleanup(self) -> None:
        self._folder.cleanup()
        self._lock.close()


def _remove_abandoned(cache: Path, prefix: str) -> None:
    for path in cache.glob(f"{prefix}*"):
        with contextlib.suppress(OSError), (path / _LOCK).open("r+") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(path)

"""The user's cache folder, and what stands in for it where there is none."""

import os
import tempfile
from pathlib import Path
from typing import NamedTuple

from platformdirs import user_cache_path


class UserCache(NamedTuple):
    """A folder that can be written, as far as one can tell without writing."""

    path: Path
    fallback: str | None
    """Why it is not the user's own folder, in one sentence; None where it is."""


def user_cache() -> UserCache:
    """The user's cache folder. A folder in the system's temporary one stands in for it
    where the user has no home (no HOME, a uid that /etc/passwd does not know), or where
    the folder cannot be written: the same one each time, for this user alone."""
    try:
        own = user_cache_path("penstock")
    except (RuntimeError, KeyError):
        return _stand_in("this user has no home folder")
    if _is_writable(own):
        return UserCache(own, None)
    return _stand_in(f"the cache folder {own} cannot be written")


def kept_file(name: str) -> Path:
    """The file `name` of the user's cache folder if it is there, even if nothing can be
    written; else where it would be written."""
    try:
        own = user_cache_path("penstock") / name
        if own.is_file():
            return own
    except (RuntimeError, KeyError, OSError):
        pass
    return user_cache().path / name


def _stand_in(why: str) -> UserCache:
    folder = Path(tempfile.gettempdir()) / f"penstock-{os.getuid()}"
    if not _is_ours(folder):
        folder = folder.with_name(f"{folder.name}-{os.getpid()}")
    return UserCache(
        folder, f"{why}: using {folder} (io.cache or XDG_CACHE_HOME names another one)"
    )


def _is_ours(folder: Path) -> bool:
    """Whether nobody else made `folder`: what is kept there is trusted."""
    try:
        return folder.lstat().st_uid == os.getuid()
    except OSError:
        return True  # it is not there


def _is_writable(folder: Path) -> bool:
    """Whether `folder` can be written or, where it is not there, made."""
    if not folder.is_absolute():  # of a home folder that is not known
        return False
    for path in (folder, *folder.parents):
        try:
            path.stat()
        except FileNotFoundError:
            continue
        except OSError:
            return False
        return path.is_dir() and os.access(path, os.W_OK | os.X_OK)
    return False

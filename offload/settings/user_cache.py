"""The user's cache folder, and the folder that replaces it if there is none."""

import os
import tempfile
from pathlib import Path
from typing import NamedTuple

from platformdirs import user_cache_path


class UserCache(NamedTuple):
    """A folder that can be written, as far as that can be told without writing."""

    path: Path
    fallback: str | None
    """Why it is not the user's own cache folder, in one sentence; None if it is."""


def user_cache() -> UserCache:
    """The user's cache folder.

    A folder below the system's temporary one replaces it if the user has no home (no
    HOME, or a uid that /etc/passwd does not know), or if the folder cannot be written.
    It is the same one each time, and belongs to this user alone.
    """
    try:
        own = user_cache_path("penstock")
    except (RuntimeError, KeyError):
        return _stand_in("this user has no home folder")
    if _is_writable(own):
        return UserCache(own, None)
    return _stand_in(f"the cache folder {own} cannot be written")


def kept_file(name: str) -> Path:
    """The file `name` in the user's cache folder, if it exists, even if the folder
    cannot be written; otherwise the path where it would be written."""
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
    """Whether no other user made `folder`: what is kept there is trusted."""
    try:
        return folder.lstat().st_uid == os.getuid()
    except OSError:
        return True  # it does not exist


def _is_writable(folder: Path) -> bool:
    """Whether `folder` can be written or, if it does not exist, made."""
    if not folder.is_absolute():  # as is the case without a home folder
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

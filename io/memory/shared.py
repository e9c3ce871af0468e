"""Memory that several processes of one machine share: one copy of what they all read.

A file in the system's shared memory, named after its content. Locks on it say who is
there, and the kernel takes them back from a process that dies:

- whoever fills it holds the exclusive lock, so others wait for the end of that;
- whoever uses it holds the shared lock;
- the last to close gets the exclusive lock at once, and removes the file;
- a fork has its parent's lock, not one of its own: it leaves the file to the parent.

After a kill of all users the file stays. The next one to come uses it, if it wants just
that and it was filled, and removes it if not.

Anybody may put a file under that name, as /dev/shm is everybody's: one is used only if
it is this user's, and nobody else can write to it.
"""

import contextlib
import errno
import fcntl
import hashlib
import mmap
import os
import stat
import time
import weakref
from collections.abc import Callable
from pathlib import Path

from ..errors import DoesNotFitError, MachineError
from ..home import Home
from .arena import HostMemory

FOLDER = Path("/dev/shm")
_READY = b"penstock: filled"
_PAGE = mmap.PAGESIZE
_RETRY_SECONDS = 0.01
_FLAGS = os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK


class SharedArena(HostMemory):
    """`nbytes` that are the same memory in every process which gives the same `key`
    (whatever determines the content: two contents must not have one key).

    `fill(arena)` is called in one of the processes, before any of them has the arena.
    Raises DoesNotFitError when the system's shared memory is too small, MachineError
    when the file of that name is somebody else's, or others can write to it.
    """

    def __init__(
        self,
        key: str,
        nbytes: int,
        fill: Callable[["SharedArena"], None],
        *,
        folder: Path = FOLDER,
    ) -> None:
        super().__init__(nbytes)
        self.was_filled_here = False
        digest = hashlib.blake2b(f"{nbytes} {key}".encode(), digest_size=16)
        self.path = folder / f"penstock-{os.geteuid()}-{digest.hexdigest()}"
        self._remove_abandoned()
        while not self._attach(fill):
            time.sleep(_RETRY_SECONDS)
        self._leave = weakref.finalize(
            self, _leave, self._descriptor, self.path, Home()
        )

    def close(self) -> None:
        """Leaves; the last of all processes frees the memory. Done at exit, too."""
        if self._view is None:
            return
        super().close()
        self._leave()

    def _remove_abandoned(self) -> None:
        """Frees what users that were killed have left. One that is just being made, and
        not locked yet, may be hit: its maker notices and makes another."""
        for path in self.path.parent.glob(f"penstock-{os.geteuid()}-*"):
            if path == self.path:
                continue
            with contextlib.suppress(OSError):
                descriptor = os.open(path, _FLAGS)
                try:
                    is_ours = _why_not_ours(os.fstat(descriptor)) is None
                    if is_ours and _lock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB):
                        path.unlink()
                finally:
                    os.close(descriptor)

    def _attach(self, fill: Callable[["SharedArena"], None]) -> bool:
        """Tries to be a user of the filled memory; False to try again."""
        descriptor = _open_own(self.path)
        if descriptor is None:  # removed since it was found
            return False
        self._descriptor = descriptor
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_SH)  # waits for one who fills
            if self._is_named() and self._is_filled():
                self._open()
                return True
            fcntl.flock(self._descriptor, fcntl.LOCK_UN)
            # Another one may be as far as this: only one of them gets it.
            if not _lock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB):
                os.close(self._descriptor)
                return False
            if not self._is_named() or self._is_filled():
                os.close(self._descriptor)
                return False
            self._fill(fill)
            # Not atomic: whoever comes between finds it filled, and uses it, too; or is
            # the last to close, and removes it: then this one's is a copy of its own.
            fcntl.flock(self._descriptor, fcntl.LOCK_SH)
        except BaseException:
            self._view = None
            os.close(self._descriptor)
            raise
        return True

    def _fill(self, fill: Callable[["SharedArena"], None]) -> None:
        try:
            os.ftruncate(self._descriptor, self.nbytes + _PAGE)
            # Now, or a full /dev/shm would kill the process at the first touch.
            os.posix_fallocate(self._descriptor, 0, self.nbytes + _PAGE)
            self._open()
            fill(self)
            os.pwrite(self._descriptor, _READY, self.nbytes)
        except BaseException as error:
            with contextlib.suppress(OSError):
                self.path.unlink()
            if isinstance(error, OSError) and error.errno in (
                errno.ENOSPC,
                errno.ENOMEM,
            ):
                raise DoesNotFitError(
                    f"{self.path.parent} has no room for {self.nbytes} bytes; enlarge "
                    "it (docker: --shm-size), lower host_memory, or set host_shared: "
                    "false"
                ) from error
            raise
        self.was_filled_here = True

    def _open(self) -> None:
        self._map = mmap.mmap(self._descriptor, self.nbytes)
        with contextlib.suppress(AttributeError, OSError):
            self._map.madvise(mmap.MADV_HUGEPAGE)
        self._view = memoryview(self._map)

    def _is_filled(self) -> bool:
        if os.fstat(self._descriptor).st_size != self.nbytes + _PAGE:
            return False
        return os.pread(self._descriptor, len(_READY), self.nbytes) == _READY

    def _is_named(self) -> bool:
        return _is_named(self._descriptor, self.path)


def _leave(descriptor: int, path: Path, home: Home) -> None:
    is_last = home.is_here and _lock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    if is_last and _is_named(descriptor, path):
        path.unlink()
    os.close(descriptor)


def _is_named(descriptor: int, path: Path) -> bool:
    """Whether the file that is open is the one by that name: the last user may have
    removed it since it was opened."""
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path))
    except FileNotFoundError:
        return False


def _open_own(path: Path) -> int | None:
    """The file `path`, made if there is none; None where it was removed meanwhile.
    Raises MachineError for one that another user made or can write to."""
    try:
        return os.open(path, _FLAGS | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError:
        pass
    except OSError as error:
        raise MachineError(
            f"cannot share memory in {path.parent} ({error.strerror}); set "
            "host_shared: false"
        ) from error
    try:
        descriptor = os.open(path, _FLAGS)
    except FileNotFoundError:
        return None
    except OSError as error:  # of another user's, or a link
        why = error.strerror or "it cannot be opened"
    else:
        reason = _why_not_ours(os.fstat(descriptor))
        if reason is None:
            return descriptor
        os.close(descriptor)
        why = reason
    raise MachineError(
        f"{path} is not used, since it may hold what others put there ({why}): remove "
        "it, or set host_shared: false"
    )


def _why_not_ours(found: os.stat_result) -> str | None:
    """Why an open file may hold what somebody else has put there; None if nobody but
    this user could."""
    if not stat.S_ISREG(found.st_mode):
        return "it is no regular file"
    if found.st_uid != os.geteuid():
        return f"it belongs to user {found.st_uid}"
    if found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        return f"others can write to it: mode {stat.S_IMODE(found.st_mode):o}"
    return None


def _lock(descriptor: int, how: int) -> bool:
    try:
        fcntl.flock(descriptor, how)
    except BlockingIOError:
        return False
    return True

"""Shares one copy of read-only content between the processes of a machine.

The memory is a file in /dev/shm, named after its content. Locks on the file say who
uses it. The kernel releases the locks of a process that dies.

- The process that fills the file holds the exclusive lock; others wait for its end.
- Each process that uses the file holds the shared lock.
- The last process to close gets the exclusive lock at once, and removes the file.
- A forked process has its parent's lock, so it leaves the file to the parent.

If all users are killed, the file stays. The next process uses it if it needs the same
content and the file was filled; otherwise it removes the file.

Every user of the machine may create files in /dev/shm. So a file is used only if it
belongs to this user and nobody else can write to it.
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
from ..fork_guard import ForkGuard
from .arena import HostMemory

FOLDER = Path("/dev/shm")
_READY = b"penstock: filled"
_PAGE = mmap.PAGESIZE
_RETRY_SECONDS = 0.01
_FLAGS = os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK


class SharedArena(HostMemory):
    """Memory of `nbytes` that is shared by all processes that give the same `key`.

    The key must determine the content: two contents must not have the same key. One of
    the processes calls `fill(arena)`; all others wait for that. Raises DoesNotFitError
    if the system's shared memory is too small. Raises MachineError if the file belongs
    to another user, or if others can write to it.
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
            self, _leave, self._descriptor, self.path, ForkGuard()
        )

    def close(self) -> None:
        """Ends the use by this process; the last process frees the memory.

        This also happens at exit.
        """
        if self._view is None:
            return
        super().close()
        self._leave()

    def _remove_abandoned(self) -> None:
        """Removes files whose users were killed.

        This may remove a file that another process has just created and not locked yet.
        That process notices and creates a new one.
        """
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
        """Tries to become a user of the filled memory. False means: try again."""
        descriptor = _open_own(self.path)
        if descriptor is None:  # another process has removed it
            return False
        self._descriptor = descriptor
        try:
            fcntl.flock(
                self._descriptor, fcntl.LOCK_SH
            )  # waits while another process fills it
            if self._is_named() and self._is_filled():
                self._open()
                return True
            fcntl.flock(self._descriptor, fcntl.LOCK_UN)
            # Several processes may come here; only one gets the exclusive lock.
            if not _lock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB):
                os.close(self._descriptor)
                return False
            if not self._is_named() or self._is_filled():
                os.close(self._descriptor)
                return False
            self._fill(fill)
            # Not atomic. A process that gets the lock in between uses the filled file.
            # If it closes and removes the file, this process keeps its own copy.
            fcntl.flock(self._descriptor, fcntl.LOCK_SH)
        except BaseException:
            self._view = None
            os.close(self._descriptor)
            raise
        return True

    def _fill(self, fill: Callable[["SharedArena"], None]) -> None:
        try:
            os.ftruncate(self._descriptor, self.nbytes + _PAGE)
            # Allocate now: a full /dev/shm would kill the process at a later write.
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


def _leave(descriptor: int, path: Path, fork_guard: ForkGuard) -> None:
    is_last = not fork_guard.is_forked and _lock(
        descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB
    )
    if is_last and _is_named(descriptor, path):
        path.unlink()
    os.close(descriptor)


def _is_named(descriptor: int, path: Path) -> bool:
    """Whether the open file still has this name: its last user may have removed it."""
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path))
    except FileNotFoundError:
        return False


def _open_own(path: Path) -> int | None:
    """Opens the file `path`, and creates it if there is none.

    None if it was removed meanwhile. Raises MachineError if another user owns it or can
    write to it.
    """
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
    except OSError as error:  # it belongs to another user, or is a link
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


def _why_not_ours(status: os.stat_result) -> str | None:
    """Why another user may have written the file; None if only this user could."""
    if not stat.S_ISREG(status.st_mode):
        return "it is not a regular file"
    if status.st_uid != os.geteuid():
        return f"it belongs to user {status.st_uid}"
    if status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        return f"others can write to it: mode {stat.S_IMODE(status.st_mode):o}"
    return None


def _lock(descriptor: int, how: int) -> bool:
    try:
        fcntl.flock(descriptor, how)
    except BlockingIOError:
        return False
    return True

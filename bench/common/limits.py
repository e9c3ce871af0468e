"""Limits the memory of a subprocess with a cgroup, if the machine allows it."""

import contextlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path

_V2 = Path("/sys/fs/cgroup")
_V1 = Path("/sys/fs/cgroup/memory")


@contextlib.contextmanager
def memory_limit(limit_bytes: int | None) -> Iterator[Callable[[], None] | None]:
    """Gives the function that a child calls before it runs (`preexec_fn`).

    It is None if there is no limit, or if the machine does not allow one; say so in the
    results.
    """
    if limit_bytes is None:
        yield None
        return
    group = _make(limit_bytes)
    if group is None:
        yield None
        return
    try:
        yield lambda: _join(group)
    finally:
        with contextlib.suppress(OSError):
            group.rmdir()


def is_allowed() -> bool:
    """Whether this process may set memory limits."""
    group = _make(1 << 30)
    if group is None:
        return False
    group.rmdir()
    return True


def _make(limit_bytes: int) -> Path | None:
    for root, marker, name in (
        (_V2, "cgroup.controllers", "memory.max"),
        (_V1, "memory.limit_in_bytes", "memory.limit_in_bytes"),
    ):
        if not (root / marker).exists():
            continue
        group = root / f"penstock-bench-{os.getpid()}"
        try:
            group.mkdir()
            (group / name).write_text(str(limit_bytes))
        except OSError:
            with contextlib.suppress(OSError):
                group.rmdir()
            continue
        return group
    return None


def _join(group: Path) -> None:
    (group / "cgroup.procs").write_text("0")

"""The memory limits of the cgroups of this process, of version 1, 2 or both.

A process is in one cgroup and in those around it, up to the root of the mount. The
limit of each of them counts.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

_NO_LIMIT = 1 << 60
"""Version 1 has the largest number of pages as the limit if there is none."""
_MOST_DIGITS = 20
_ESCAPE = re.compile(r"\\([0-7]{3})")
"""An escape in mountinfo: a blank is `\\040`."""
_FOLDERS = {1: "/sys/fs/cgroup/memory", 2: "/sys/fs/cgroup"}
"""Where the hierarchies are mounted if mountinfo does not tell."""


@dataclass(frozen=True, slots=True)
class Level:
    """One cgroup that contains this process and has a limit. Sizes are in bytes."""

    folder: Path
    limit: int
    """The limit for all processes in this cgroup and below. Above it they are killed
    or, with `memory.high`, slowed down very much."""
    used: int
    """What they use, without the page cache that the kernel drops before it kills a
    process."""

    @property
    def available(self) -> int:
        """Bytes that may still be taken."""
        return max(self.limit - self.used, 0)


@dataclass(frozen=True, slots=True)
class _Mount:
    folder: Path
    top: str
    """The cgroup whose folder is `folder`."""


def levels(root: Path = Path("/")) -> list[Level]:
    """The cgroups with a limit, from the innermost outwards.

    `root` is the root of the file system; tests use another one. A file that cannot be
    read or understood sets no limit.
    """
    found: dict[Path, Level] = {}
    for version, path in _own_paths(_text(root / "proc/self/cgroup")):
        mounts = _mounts(root, version) or [
            _Mount(_below(root, _FOLDERS[version]), "/")
        ]
        for index, folder in enumerate(_folders(mounts, path)):
            level = _LEVELS[version](folder, is_own=index == 0)
            if level is not None:
                found.setdefault(folder, level)
    return list(found.values())


def _own_paths(text: str) -> Iterator[tuple[int, str]]:
    """The version and the process's path of each hierarchy that may limit memory."""
    for line in text.splitlines():
        number, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if not path.startswith("/"):
            continue
        if number == "0" and not controllers:
            yield 2, path
        elif "memory" in controllers.split(","):
            yield 1, path


def _mounts(root: Path, version: int) -> list[_Mount]:
    """Where the hierarchy of `version` that limits memory is mounted."""
    found = []
    for line in _text(root / "proc/self/mountinfo").splitlines():
        before, _, after = line.partition(" - ")
        fields, kind = before.split(" "), after.split(" ")
        if len(fields) < 5 or len(kind) < 3:
            continue
        is_it = kind[0] == "cgroup2" if version == 2 else kind[0] == "cgroup"
        if is_it and (version == 2 or "memory" in kind[2].split(",")):
            folder = _below(root, _unescaped(fields[4]))
            found.append(_Mount(folder, _unescaped(fields[3])))
    return found


def _folders(mounts: list[_Mount], path: str) -> list[Path]:
    """The folders of the cgroup `path` and of those around it, the innermost first.

    In a container, `path` may be that of the host, while the container's own cgroup is
    at the root of the mount. Then the folders are the root, and those parts of the path
    that exist below it.
    """
    around = [mount for mount in mounts if _is_around(mount.top, path)]
    found: list[Path] = []
    for mount in around or mounts:
        parts = PurePosixPath(path).relative_to("/").parts
        if around:
            parts = PurePosixPath(path).relative_to(mount.top).parts
        if ".." in parts:  # outside of what this process may see
            parts = ()
        inwards = [mount.folder.joinpath(*parts[:n]) for n in range(len(parts) + 1)]
        found += [folder for folder in reversed(inwards) if folder.is_dir()]
    return found


def _is_around(top: str, path: str) -> bool:
    return ".." not in top and PurePosixPath(path).is_relative_to(top)


def _level_of_1(folder: Path, *, is_own: bool) -> Level | None:
    if not is_own and _number(folder / "memory.use_hierarchy") == 0:
        return None  # it counts only its own processes, not those of cgroups in it
    stat = _stat(folder)
    limits = [
        limit
        for limit in (
            _number(folder / "memory.limit_in_bytes"),
            # Includes the limits of cgroups around it, which may be invisible here.
            stat.get("hierarchical_memory_limit"),
        )
        if limit is not None and limit < _NO_LIMIT
    ]
    if not limits:
        return None
    used = _number(folder / "memory.usage_in_bytes") or 0
    cache = _reclaimable(stat, "total_", ("dirty", "writeback"))
    return Level(folder, min(limits), max(used - cache, 0))


def _level_of_2(folder: Path, *, is_own: bool) -> Level | None:
    names = ("memory.max", "memory.high")
    limits = [n for n in (_number(folder / name) for name in names) if n is not None]
    if not limits:
        return None
    used = _number(folder / "memory.current") or 0
    cache = _reclaimable(_stat(folder), "", ("file_dirty", "file_writeback"))
    return Level(folder, min(limits), max(used - cache, 0))


_LEVELS = {1: _level_of_1, 2: _level_of_2}


def _reclaimable(stat: Mapping[str, int], prefix: str, busy: tuple[str, ...]) -> int:
    """Bytes of file pages that can be dropped, since they are on disk as well."""

    def of(name: str) -> int:
        return stat.get(prefix + name, stat.get(name, 0))

    files = of("inactive_file") + of("active_file")
    return max(files - sum(of(name) for name in busy), 0)


def _stat(folder: Path) -> dict[str, int]:
    found = {}
    for line in _text(folder / "memory.stat").splitlines():
        name, _, value = line.partition(" ")
        number = _decimal(value.strip())
        if number is not None:
            found[name] = number
    return found


def _number(path: Path) -> int | None:
    """The number in the file `path`; None for "max", and if it is not a number."""
    return _decimal(_text(path).strip())


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def _decimal(text: str) -> int | None:
    is_number = text.isascii() and text.isdecimal() and len(text) <= _MOST_DIGITS
    return int(text) if is_number else None


def _below(root: Path, path: str) -> Path:
    return root / path.lstrip("/")


def _unescaped(text: str) -> str:
    return _ESCAPE.sub(lambda match: chr(int(match[1], 8)), text)

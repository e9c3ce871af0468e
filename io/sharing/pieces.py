"""The pieces that reads are cut into, and where a pass begins. Pure."""

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from ..checkpoint.header import FileStamp
from ..extent import Extent
from ..handle import Handle
from .table import Key


def cut(extent: Extent, piece_bytes: int) -> Iterator[Extent]:
    """Cuts `extent` at the multiples of `piece_bytes` in the file. So processes that
    read it from other places on have most pieces in common."""
    start = extent.offset
    while start < extent.end:
        end = min((start // piece_bytes + 1) * piece_bytes, extent.end)
        yield Extent(extent.path, start, end - start)
        start = end


def digests(stamps: Mapping[Path, FileStamp]) -> dict[Path, tuple[int, int]]:
    """A digest of each file: equal in two processes only if the file is the same."""
    return {path: _digest(f"{path} {stamp}") for path, stamp in stamps.items()}


def _digest(text: str) -> tuple[int, int]:
    found = hashlib.blake2b(text.encode(errors="surrogateescape"), digest_size=16)
    first, last = found.digest()[:8], found.digest()[8:]
    return _number(first), _number(last)


def _number(digest: bytes) -> int:
    return int.from_bytes(digest, "little", signed=True)


@dataclass(eq=False, slots=True)
class Piece:
    """One piece of a read, and what has been done about it."""

    extent: Extent
    buffer: memoryview | None
    """Where it is read to; None at the end, since a mapping is freed only after its
    last view."""
    handle: Handle
    key: Key
    begins_pass: bool
    has_arrived: bool = False
    """Whether others know that this process is at the start of this pass."""
    waits_since: float | None = None
    """When another process was first seen to read it."""
    started_at: float | None = None
    """When this process began to read it."""
    slot: int = -1
    """The slot that it is read for."""
    reading: Handle | None = field(default=None, repr=False)


class PassStarts:
    """Finds where passes begin: with the first piece that this pass has read already.
    The first piece of all begins the first one."""

    def __init__(self) -> None:
        self._seen: set[Key] = set()

    def begins(self, key: Key) -> bool:
        """Whether `key`, which is read next, begins a pass."""
        is_start = not self._seen or key in self._seen
        if is_start:
            self._seen.clear()
        self._seen.add(key)
        return is_start

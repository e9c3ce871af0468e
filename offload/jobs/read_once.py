"""Whether workers read files once for all of them, and through what memory."""

import logging
from collections.abc import Iterable
from pathlib import Path

from ...io.errors import MachineError
from ...io.readers.files import reads_directly
from ...io.sharing.ring import RingShape, SharedRing
from ..machines.part_machine import why_each_reads
from ..policy import Policy

_log = logging.getLogger("penstock")
_MOST_BYTES = 1 << 30
_SHARE_OF_MODEL = 8
_SHARE_OF_MEMORY = 16
KEY = "io.read_once"


def why_not(policy: Policy, files: Iterable[Path]) -> str | None:
    """Why the workers do not share what they read of `files`; None if they do."""
    is_on_gpu = policy.device != "cpu"
    if why := why_each_reads(policy, policy.io.reader, is_on_gpu=is_on_gpu):
        return f"{KEY}: {why}"
    if not all(map(reads_directly, files)):
        return f"{KEY}: workers share the page cache: the file system has no O_DIRECT"
    return None


def ring_bytes(model_bytes: int, free_bytes: int) -> int:
    """The memory that workers of a model of `model_bytes` share what they read through,
    of `free_bytes` that are to be divided among them. Pure."""
    parts = model_bytes // _SHARE_OF_MODEL, free_bytes // _SHARE_OF_MEMORY
    return max(0, min(_MOST_BYTES, *parts))


def open_ring(policy: Policy, num: int, nbytes: int) -> tuple[SharedRing | None, str]:
    """The ring of at most `nbytes` for `num` workers, and a sentence about it. None if
    there is no room for one, or the system has no such memory; that is logged."""
    shape = RingShape.within(nbytes, num_seats=num, most_piece_bytes=policy.io.chunk)
    if shape is None:
        return None, (
            f"{KEY}: {nbytes:,} bytes are too few for {num} workers to share what they "
            "read: each reads all itself"
        )
    try:
        ring = SharedRing(shape)
    except MachineError as error:
        note = f"{KEY}: {error}: each worker reads all itself"
        _log.warning(note)
        return None, note
    return ring, (
        f"{KEY}: workers share what they read, through {shape.nbytes:,} bytes of memory"
    )

"""Is the checkpoint on disk what it was? By checksums in a file beside it."""

from dataclasses import dataclass
from pathlib import Path

from ...io.checkpoint.index import open_checkpoint
from ...io.readers.checksums import (
    SIDE_FILE,
    checksums,
    differences,
    read_side_file,
    write_side_file,
)
from ..monitoring.progress import FillProgress
from ..policy import Policy
from .readers import open_reader


@dataclass(frozen=True, slots=True)
class Integrity:
    """What was found."""

    side_file: Path
    was_written: bool
    """There was no file of checksums: now there is."""
    num_tensors: int
    differences: tuple[str, ...]


def verify_checksums(path: str | Path, policy: Policy | None = None) -> Integrity:
    """Sums every tensor of the checkpoint in `path` and compares with the file of
    checksums beside it, which is written when there is none.

    Raises CheckpointError for a checkpoint or side file that cannot be read,
    OutputError where the side file cannot be written, ReadError from the device.
    """
    checkpoint = open_checkpoint(path)
    side_file = checkpoint.folder / SIDE_FILE
    known = read_side_file(side_file) if side_file.exists() else None
    reader, _ = open_reader(checkpoint.stamps, (policy or Policy()).io)
    with reader, FillProgress("summing the checkpoint") as progress:
        found = checksums(checkpoint, reader, progress)
    if known is None:
        write_side_file(side_file, found)
    return Integrity(
        side_file,
        known is None,
        len(found),
        () if known is None else tuple(differences(known, found)),
    )
